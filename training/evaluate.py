"""How good a model's scores are on examples it has not seen, each figure with its interval. Pure but for `rescoring`.

Mind what the log can tell. Only shown items have labels, and the champion chose them: rank figures are over the shown
items of a slate, so a challenger gets no credit for what it alone would have shown (`training.off_policy` asks that).
Coverage, novelty and diversity need no labels: they look at who would stand first among all logged candidates, the
shown and the sample of those not shown. Slates are short, hence figures at 3 beside those at 10.

What the gate compares is over all candidates, as far as the logged ones stand for them (`training.judged_gains`).

Shapes: E examples, S items of the longest slate, N candidates, M columns, R resamples, B bins, k first places.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
from numpy.typing import NDArray

from training.calibration import (
    AS_SCORED,
    NUM_BINS,
    Platt,
    ReliabilityBin,
    assign_bins,
    calibration_error,
    logits_so_far,
)
from training.examples import Example
from training.first_places import Sanity, check_sanity, stand_first
from training.judged_gains import judged_ndcgs
from training.popularity import Popularity
from training.ranking_metrics import Interval
from training.rescoring import BundleScorer, ItemTable, score_examples
from training.slate_metrics import (
    Reals,
    Slates,
    aucs,
    hits,
    line_up,
    log_losses,
    ndcgs,
    reciprocal_ranks,
    resample_sums,
    retrieved,
)
from training.slices import slice_masks

__all__ = ["BundleScorer", "Evaluation", "SliceFigures", "evaluate", "score_examples"]

TOP, SHORT = 10, 3
CONFIDENCE = 0.95
SLICE_FIGURES = ("ndcg_10", "mrr", "hit_3", "auc", "log_loss", "click_rate")

Ratio = tuple[Reals, Reals]  # a figure is the sum of the first over the sum of the second, float64 [E] each


class SliceFigures(msgspec.Struct, frozen=True):
    """Some of the examples: how many, and their figures."""

    examples: int
    figures: dict[str, Interval]


@dataclass(frozen=True)
class Evaluation:
    """One model on one set of examples.

    `ranked` slates have a gain and more than one item, and only they tell about ranks. `judged_E` is what the gate
    compares: NDCG@10 by example as judged, NaN where there is nothing to gain or to order.
    `readers_E` numbers the readers: slates of one hang together.
    """

    examples: int
    ranked: int
    shown: int
    figures: dict[str, Interval]
    slices: dict[str, SliceFigures]
    reliability: list[ReliabilityBin]
    platt: Platt
    sanity: Sanity
    judged_E: Reals
    readers_E: NDArray[np.int64]

    def plain(self) -> dict[str, object]:
        """Returns everything but the values by example, ready for JSON; what is not a number becomes null."""
        found = {name: getattr(self, name) for name in self.__dataclass_fields__ if not name.endswith("_E")}
        return msgspec.convert(msgspec.json.decode(msgspec.json.encode(found)), dict[str, object])


def evaluate(
    examples: Sequence[Example],
    scores: Sequence[NDArray[np.floating]],
    *,
    popularity: Popularity,
    items: ItemTable | None = None,
    platt: Platt = AS_SCORED,
    gains: Sequence[Reals] | None = None,
    seed: int = 0,
    bootstrap: int = 1000,
) -> Evaluation:
    """Returns the figures of `scores` ([N] per example) with 95 % percentile bootstrap intervals over the examples.

    `popularity` is of the training window. `items` give the vectors for diversity: take the same for every model that
    is compared. Log loss and calibration are of clicks that have come by now, of which some slates have fewer than they
    will have. `platt` was fitted on earlier examples (`calibration.fit_platt`); without it the score itself is taken
    for the logit of a click. `gains` ([N] per example, of `training.judged_gains`) are what the gate compares by, the
    logged ones where they are not given. Champion and challenger evaluated with one seed share their resamples. Raises
    ValueError without examples.
    """
    if not examples or len(examples) != len(scores):
        raise ValueError(f"{len(scores)} score arrays for {len(examples)} examples")
    # 1. Shown items side by side, and the figures of each slate.
    slates = line_up(
        [of[: one.num_shown] for one, of in zip(examples, scores, strict=True)],
        [one.gains_N[: one.num_shown] for one in examples],
        [one.clicked_N[: one.num_shown] for one in examples],
    )
    logits_ES = logits_so_far(platt.logits(slates.scores_ES), np.array([[one.arrived] for one in examples]))
    ratios = _label_ratios(slates, logits_ES)
    whole = line_up(scores, [one.gains_N for one in examples], [one.clicked_N for one in examples])
    judged_E = ndcgs(whole, TOP)
    ranked = int(np.isfinite(judged_E).sum())
    if gains is not None:
        judged_E = judged_ndcgs(examples, scores, gains, TOP)
        ratios["ndcg_10_judged"] = _mean(judged_E)
    # 2. Who would stand first, which needs no labels.
    first = stand_first(examples, scores, SHORT, seed)
    ratios["novelty"] = first.self_information(popularity)
    if items is not None:
        ratios["diversity"] = _mean(first.diversities(items))
    # 3. One resampling for everything: figures, slices, calibration.
    masks = {"": np.ones(len(examples), dtype=np.bool_)} | slice_masks(examples, popularity)
    cells = [(group, name) for group in masks for name in (SLICE_FIGURES if group else ratios)]
    columns = [np.where(masks[group], part, 0.0) for group, name in cells for part in ratios[name]]
    bins_E3B = _bin_sums(slates, logits_ES)
    columns_EM = np.concatenate([np.stack(columns, axis=1), bins_E3B.reshape(len(examples), -1)], axis=1)
    sums_RM = resample_sums(columns_EM, resamples=bootstrap, seed=seed)
    # 4. Intervals.
    found = {
        cell: _interval(_quotient, columns_EM[:, at : at + 2], sums_RM[:, at : at + 2])
        for cell, at in zip(cells, range(0, 2 * len(cells), 2), strict=True)
    }
    figures = {name: found["", name] for name in ratios}
    binned = slice(2 * len(cells), None)
    figures["calibration_error"] = _interval(_calibration_error, columns_EM[:, binned], sums_RM[:, binned])
    figures["coverage"] = first.coverage(CONFIDENCE)
    return Evaluation(
        examples=len(examples),
        ranked=ranked,
        shown=int(slates.shown_ES.sum()),
        figures=figures,
        slices={
            group: SliceFigures(int(mask_E.sum()), {name: found[group, name] for name in SLICE_FIGURES})
            for group, mask_E in masks.items()
            if group
        },
        reliability=_reliability(bins_E3B.sum(0)),
        platt=platt,
        sanity=check_sanity(scores, first, popularity),
        judged_E=judged_E,
        readers_E=np.unique([one.user_id for one in examples], return_inverse=True)[1].astype(np.int64),
    )


def _label_ratios(slates: Slates, logits_ES: Reals) -> dict[str, Ratio]:
    precision_E, recall_E, f1_E = retrieved(slates, SHORT)
    shown_E = slates.shown_ES.sum(1).astype(np.float64)
    return {
        "ndcg_10": _mean(ndcgs(slates, TOP)),
        "mrr": _mean(reciprocal_ranks(slates)),
        "hit_3": _mean(hits(slates, SHORT)),
        "hit_10": _mean(hits(slates, TOP)),
        "auc": _mean(aucs(slates)),
        "precision_3": _mean(precision_E),
        "recall_3": _mean(recall_E),
        "f1_3": _mean(f1_E),
        "log_loss": (log_losses(logits_ES, slates), shown_E),
        "click_rate": (slates.clicked_ES.sum(1).astype(np.float64), shown_E),
    }


def _bin_sums(slates: Slates, logits_ES: Reals) -> Reals:
    """Returns float64 [E,3,B]: how many shown items fall into each bin, their chances and their clicks, summed."""
    with np.errstate(over="ignore"):
        chances_I = 1 / (1 + np.exp(-logits_ES[slates.shown_ES]))
    examples_I = np.nonzero(slates.shown_ES)[0]
    cells_I = examples_I * NUM_BINS + assign_bins(chances_I)
    size = len(logits_ES) * NUM_BINS
    weights = (np.ones(len(cells_I)), chances_I, slates.clicked_ES[slates.shown_ES].astype(np.float64))
    sums = [np.bincount(cells_I, weights=weight, minlength=size).reshape(-1, NUM_BINS) for weight in weights]
    return np.stack(sums, axis=1)


def _reliability(sums_3B: Reals) -> list[ReliabilityBin]:
    return [
        ReliabilityBin(int(count), float(chances / count), float(clicks / count))
        for count, chances, clicks in sums_3B.T
        if count
    ]


def _mean(values_E: Reals) -> Ratio:
    """Returns the mean of the values as a quotient; a value that is not a number takes no part."""
    known_E = np.isfinite(values_E)
    return np.where(known_E, values_E, 0.0), known_E.astype(np.float64)


def _quotient(sums: Reals) -> Reals:
    with np.errstate(invalid="ignore", divide="ignore"):
        result: Reals = sums[..., 0] / sums[..., 1]
    return result


def _calibration_error(sums: Reals) -> Reals:
    return calibration_error(*np.split(sums, 3, axis=-1))


def _interval(figure: Callable[[Reals], Reals], columns_EM: Reals, sums_RM: Reals) -> Interval:
    found, drawn_R = float(figure(columns_EM.sum(0))), figure(sums_RM)
    known = drawn_R[np.isfinite(drawn_R)]
    if not np.isfinite(found) or not len(known):
        return Interval(float("nan"), float("nan"), float("nan"))
    low, high = np.quantile(known, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Interval(found, float(low), float(high))
