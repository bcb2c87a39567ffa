"""Scores become chances of a click, and how far such chances are from what happened. Pure.

A served score is a utility: the click logit plus the weighted rating. It becomes the logit of a click by Platt's
scaling (1999), a line fitted on examples EARLIER than those judged, so that log loss and calibration compare models
and not the scales on which they happen to score.

Shapes: I shown items of all slates together, B bins.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize

Reals = NDArray[np.float64]
Flags = NDArray[np.bool_]

NUM_BINS = 10
_LEAST_OF_EACH = 5  # clicks, and items not clicked, below which no slope is believed


@dataclass(frozen=True)
class Platt:
    """The logit of a click is `slope * score + intercept`."""

    slope: float
    intercept: float

    def logits(self, scores: NDArray[np.floating]) -> Reals:
        """Returns float64 logits of the same shape; not a number where the score is not finite."""
        finite = np.where(np.isfinite(scores), scores, np.nan).astype(np.float64)
        result: Reals = self.slope * finite + self.intercept
        return result


AS_SCORED = Platt(1.0, 0.0)  # takes the score itself for a logit, which a trained click head nearly is


def fit_platt(scores_I: NDArray[np.floating], clicked_I: Flags, arrived_I: Reals | None = None) -> Platt:
    """Returns the scaling that explains these clicks best: logistic regression, on clicks that come sooner or later.

    `arrived_I` is the share of an item's clicks that will have come by now (`training.arrival`), 1 where not given.
    With fewer than five clicks or five items not clicked, or scores that do not differ, it is flat at the smoothed
    click rate. A slope below zero is kept: it says that the scores run against the clicks.
    """
    finite_I = np.isfinite(scores_I)
    scores, clicked = scores_I[finite_I].astype(np.float64), clicked_I[finite_I]
    arrived = np.ones(len(scores)) if arrived_I is None else arrived_I[finite_I]
    clicks, others = int(clicked.sum()), int((~clicked).sum())
    spread = float(scores.std()) if len(scores) else 0.0
    if min(clicks, others) < _LEAST_OF_EACH or spread < 1e-9:
        chance = min((clicks + 1) / (arrived.sum() + 2), 1 - 1 / (arrived.sum() + 2))
        return Platt(0.0, float(np.log(chance / (1 - chance))))
    # Fitted on the standard scale, where the solver is at ease.
    centre = float(scores.mean())
    standard, sign = (scores - centre) / spread, np.where(clicked, -1.0, 1.0)

    def loss(line: Reals) -> float:
        logits = logits_so_far(line[0] * standard + line[1], arrived)
        return float(np.logaddexp(0.0, sign * logits).mean())

    fitted = minimize(loss, np.array([0.0, np.log(clicks / others)]), method="BFGS").x
    slope = float(fitted[0]) / spread
    return Platt(slope, float(fitted[1]) - slope * centre)


def logits_so_far(logits: Reals, arrived: Reals) -> Reals:
    """Returns the logits of a click that has come already, where that share of clicks has; shapes broadcast."""
    with np.errstate(divide="ignore", over="ignore"):  # log(a p) - log(1 - a p), where p is the chance of a click
        result: Reals = logits + np.log(arrived) - np.logaddexp(0.0, np.log(1 - arrived) + logits)
    return result


@dataclass(frozen=True)
class ReliabilityBin:
    """Shown items of like predicted chance: how many, the mean chance, and the share clicked."""

    items: int
    predicted: float
    clicked: float


def assign_bins(chances_I: Reals, num_bins: int = NUM_BINS) -> NDArray[np.int64]:
    """Returns int64 [I]: the bin of each chance, 0 the lowest, equally many items in each but for ties.

    Clicks are rare, and bins of equal width would put nearly all items into one (Nixon et al. 2019).
    """
    known = chances_I[np.isfinite(chances_I)]
    if not len(known):
        return np.zeros(len(chances_I), dtype=np.int64)
    edges = np.quantile(known, np.linspace(0, 1, num_bins + 1)[1:-1])
    return np.searchsorted(edges, chances_I, side="left").clip(0, num_bins - 1).astype(np.int64)


def calibration_error(counts: Reals, chances: Reals, clicks: Reals) -> Reals:
    """Returns the expected calibration error from sums by bin [..., B]: mean distance of chance and share clicked."""
    result: Reals = np.abs(chances - clicks).sum(-1) / counts.sum(-1)
    return result
