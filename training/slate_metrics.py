"""The figures of many slates at once, one value a slate, and sums over resamples of the slates. Pure.

scikit-learn takes one slate a call; these take all of them, and tests/unit/test_evaluate.py holds them equal to it.
A score that is not a number ranks last. Ties never help: NDCG averages over their orders (McSherry and Najork 2008),
the rest take the middle rank of those that tie, as `training.ranking_metrics` does.

Shapes: E examples, S shown items of the longest slate, M columns, R resamples, k places.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Reals = NDArray[np.float64]
Flags = NDArray[np.bool_]
Rows = NDArray[np.int64]

_PAIRS_PER_PART = 4_000_000
_DRAWS_PER_PART = 2_000_000


@dataclass(frozen=True)
class Slates:
    """Slates of several lengths as rows.

    `ahead_ES` counts the shown items that score higher, `tied_ES` those that score the same, itself among them, and
    `ranks_ES` is 1 for the best, the middle rank of those that tie. Where `shown_ES` is false the rest means nothing;
    gains and clicks are 0 there.
    """

    scores_ES: Reals
    gains_ES: Reals
    clicked_ES: Flags
    shown_ES: Flags
    ahead_ES: Rows
    tied_ES: Rows
    ranks_ES: Reals


def line_up(
    scores: Sequence[NDArray[np.floating]],
    gains: Sequence[NDArray[np.floating]],
    clicked: Sequence[NDArray[np.bool_]],
) -> Slates:
    """Returns slates, given item by item in the order shown, as rows of one width."""
    lengths_E = np.array([len(of) for of in scores], dtype=np.int64)
    width = max(int(lengths_E.max(initial=0)), 1)
    shown_ES = np.arange(width) < lengths_E[:, None]

    scores_ES, gains_ES, clicked_ES = np.zeros(shown_ES.shape), np.zeros(shown_ES.shape), np.zeros_like(shown_ES)
    if len(scores):
        scores_ES[shown_ES], gains_ES[shown_ES] = np.concatenate(list(scores)), np.concatenate(list(gains))
        clicked_ES[shown_ES] = np.concatenate(list(clicked))
    order_ES = np.where(np.isnan(scores_ES) | ~shown_ES, -np.inf, scores_ES)
    ahead_ES, tied_ES = np.zeros(shown_ES.shape, np.int64), np.ones(shown_ES.shape, np.int64)
    step = max(_PAIRS_PER_PART // width**2, 1)
    for part in (slice(start, start + step) for start in range(0, len(order_ES), step)):
        others, own = order_ES[part, None, :], order_ES[part, :, None]
        real = shown_ES[part, None, :]
        ahead_ES[part] = ((others > own) & real).sum(-1)
        tied_ES[part] = np.maximum(((others == own) & real).sum(-1), 1)
    return Slates(
        scores_ES=scores_ES,
        gains_ES=gains_ES,
        clicked_ES=clicked_ES,
        shown_ES=shown_ES,
        ahead_ES=ahead_ES,
        tied_ES=tied_ES,
        ranks_ES=1 + ahead_ES + (tied_ES - 1) / 2,
    )


def ndcgs(slates: Slates, top: int) -> Reals:
    """Returns float64 [E]: NDCG of the graded gains up to rank `top`; not a number without a gain or a second item."""
    return _divide(*gained(slates, top))


def pooled_ndcgs(slates: Slates, top: int) -> Reals:
    """Returns float64 [E]: NDCG of each slate's gains, by the mean ideal of all of them.

    `ndcgs` divides each slate by its own ideal, so a slate with one gain says as much as one with ten, and gains that
    are weighted, or only expected, lose their weights where a slate has few. Here a slate may exceed 1.
    """
    found_E, ideal_E = gained(slates, top)
    return _divide(found_E, np.where(ideal_E > 0, ideal_E.sum() / max(int((ideal_E > 0).sum()), 1), 0.0))


def gained(slates: Slates, top: int) -> tuple[Reals, Reals]:
    """Returns float64 [E] twice: the discounted gains up to rank `top`, and the most they could be, 0 for one item."""
    width = slates.gains_ES.shape[1]
    discounts_S = np.where(np.arange(width) < top, 1 / np.log2(np.arange(width) + 2), 0.0)
    upto = np.concatenate([[0.0], np.cumsum(discounts_S)])
    # An item that ties holds each of the tied places equally often.
    last_ES = np.minimum(slates.ahead_ES + slates.tied_ES, width)
    discount_ES = (upto[last_ES] - upto[slates.ahead_ES]) / slates.tied_ES
    found_E: Reals = (slates.gains_ES * discount_ES).sum(1)
    ideal_E: Reals = -np.sort(-slates.gains_ES, axis=1) @ discounts_S
    return found_E, np.where(slates.shown_ES.sum(1) > 1, ideal_E, 0.0)


def reciprocal_ranks(slates: Slates) -> Reals:
    """Returns float64 [E]: 1 / rank of the best clicked item; not a number where nothing was clicked."""
    best_E = np.where(slates.clicked_ES, slates.ranks_ES, np.inf).min(1)
    return np.where(_rankable(slates), 1 / best_E, np.nan)


def hits(slates: Slates, top: int) -> Reals:
    """Returns float64 [E]: 1 where a clicked item ranks within `top`; not a number where nothing was clicked."""
    found_E = (slates.clicked_ES & (slates.ranks_ES <= top)).any(1)
    return np.where(_rankable(slates), found_E, np.nan)


class Retrieved(NamedTuple):
    """Precision, recall and their harmonic mean, float64 [E] each."""

    precision_E: Reals
    recall_E: Reals
    f1_E: Reals


def retrieved(slates: Slates, top: int) -> Retrieved:
    """Returns how the clicked items and the `top` ranks agree; not a number where nothing was clicked."""
    found_E = (slates.clicked_ES & (slates.ranks_ES <= top)).sum(1).astype(np.float64)
    wanted_E = np.where(_rankable(slates), slates.clicked_ES.sum(1), np.nan)
    given_E = np.minimum(slates.shown_ES.sum(1), top)
    return Retrieved(_divide(found_E + 0 * wanted_E, given_E), found_E / wanted_E, 2 * found_E / (given_E + wanted_E))


def aucs(slates: Slates) -> Reals:
    """Returns float64 [E]: the chance that a clicked item outranks another of its slate; needs one of each."""
    clicks_E = slates.clicked_ES.sum(1)
    others_E = slates.shown_ES.sum(1) - clicks_E
    # Ranks count from the best, so a clicked item's distance to the last rank counts whom it beats, clicked ones too.
    beaten_E = np.where(slates.clicked_ES, slates.shown_ES.sum(1)[:, None] - slates.ranks_ES, 0.0).sum(1)
    return _divide(beaten_E - clicks_E * (clicks_E - 1) / 2, clicks_E * others_E)


def log_losses(logits_ES: Reals, slates: Slates) -> Reals:
    """Returns float64 [E]: the summed log loss of a slate's shown items, under logits of a click."""
    with np.errstate(invalid="ignore"):
        losses_ES = np.logaddexp(0.0, logits_ES) - np.where(slates.clicked_ES, logits_ES, 0.0)
    result: Reals = np.where(slates.shown_ES, losses_ES, 0.0).sum(1)
    return result


def resample_sums(columns_EM: Reals, *, resamples: int, seed: int) -> Reals:
    """Returns float64 [R, M]: each column summed over as many examples as there are, drawn with replacement."""
    count = len(columns_EM)
    rng = np.random.default_rng(seed)
    sums = []
    step = max(_DRAWS_PER_PART // max(count, 1), 1)
    for start in range(0, resamples, step):
        size = min(step, resamples - start)
        drawn = rng.integers(0, count, size=(size, count)) + np.arange(size)[:, None] * count
        times_RE = np.bincount(drawn.ravel(), minlength=size * count).reshape(size, count)
        sums.append(times_RE.astype(np.float64) @ columns_EM)
    result: Reals = np.concatenate(sums)
    return result


def _rankable(slates: Slates) -> Flags:
    result: Flags = slates.clicked_ES.any(1) & (slates.shown_ES.sum(1) > 1)
    return result


def _divide(over: Reals, under: NDArray[np.generic]) -> Reals:
    """Returns the quotient, not a number where the divisor is 0."""
    divisor = np.asarray(under, np.float64)
    result: Reals = np.where(divisor > 0, over / np.where(divisor > 0, divisor, 1.0), np.nan)
    return result
