"""How good a ranking is, and how sure that is. Pure; knows neither models nor events.

Two settings: one answer among many candidates (`half_tie_rank`, then figures of ranks), and a slate with several
clicks (`slate_figures`). Ties never help and never hurt: a candidate's rank counts half of those that tie with it.

Shapes: N candidates or items of a slate, E scored events, C clusters (users), R resamples.
"""

from collections.abc import Hashable, Sequence
from typing import NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

Reals = NDArray[np.floating]
TOP = 10


class Interval(msgspec.Struct, frozen=True):
    """A mean and its confidence interval."""

    mean: float
    low: float
    high: float


class SlateFigures(NamedTuple):
    """One slate's figures, each 0 to 1."""

    auc: float
    mrr: float
    ndcg_5: float
    ndcg_10: float


def half_tie_rank(scores_N: Reals, answer: int) -> float:
    """Returns 1 + how many scored higher + half of those that tied, the answer itself not counted.

    A score that is not a number ranks below every number, so that it never wins.

    >>> half_tie_rank(np.array([0.5, 0.9, 0.5, 0.1]), 0)
    2.5
    """
    ordered_N = np.where(np.isnan(scores_N), -np.inf, scores_N)
    own = ordered_N[answer]
    return float(1 + np.count_nonzero(ordered_N > own) + (np.count_nonzero(ordered_N == own) - 1) / 2)


def hit_rates(ranks_E: Reals, top: int = TOP) -> NDArray[np.float64]:
    """Returns float64 [E]: 1 where the answer is among the `top`."""
    return (ranks_E <= top).astype(np.float64)


def ndcgs(ranks_E: Reals, top: int = TOP) -> NDArray[np.float64]:
    """Returns float64 [E]: 1/log2(rank + 1) up to rank `top`, then 0. With one answer the ideal is 1."""
    result: NDArray[np.float64] = np.where(ranks_E <= top, 1 / np.log2(np.asarray(ranks_E, np.float64) + 1), 0.0)
    return result


def reciprocal_ranks(ranks_E: Reals) -> NDArray[np.float64]:
    """Returns float64 [E]: 1/rank."""
    result: NDArray[np.float64] = 1 / np.asarray(ranks_E, np.float64)
    return result


def slate_figures(scores_N: Reals, clicked_N: NDArray[np.bool_]) -> SlateFigures:
    """Returns AUC, MRR, nDCG@5 and nDCG@10 of one slate, as MIND defines them (Wu et al. 2020).

    MRR is the mean over the clicked items. Raises ValueError unless something was clicked and something was not.
    """
    clicks = int(clicked_N.sum())
    if not 0 < clicks < len(clicked_N):
        raise ValueError("a slate's figures need a clicked item and one that was not")
    ranks_N = np.array([half_tie_rank(scores_N, index) for index in range(len(scores_N))])
    clicked_ranks = ranks_N[clicked_N]
    # Ranks count from above: the sum of the clicked ones' distances from the end is the Mann-Whitney statistic.
    others = len(scores_N) - clicks
    auc = (len(scores_N) * clicks + clicks - clicked_ranks.sum() - clicks * (clicks + 1) / 2) / (clicks * others)
    return SlateFigures(
        auc=float(auc),
        mrr=float(reciprocal_ranks(clicked_ranks).mean()),
        ndcg_5=_slate_ndcg(clicked_ranks, 5),
        ndcg_10=_slate_ndcg(clicked_ranks, 10),
    )


def _slate_ndcg(clicked_ranks: Reals, top: int) -> float:
    ideal = ndcgs(np.arange(1, len(clicked_ranks) + 1, dtype=np.float64), top)
    return float(ndcgs(clicked_ranks, top).sum() / ideal.sum())


def bootstrap_interval(
    values_E: Reals,
    clusters_E: Sequence[Hashable] | None = None,
    *,
    seed: int = 0,
    resamples: int = 1000,
    confidence: float = 0.95,
) -> Interval:
    """Returns the mean of the values and its interval.

    Whole clusters are drawn where given (all events of a user, which resemble each other), single values otherwise.
    The interval of a difference is that of paired differences. Not a number where there are no values.
    """
    values = np.asarray(values_E, dtype=np.float64)
    if not len(values):
        return Interval(float("nan"), float("nan"), float("nan"))
    # 1. Sums and sizes by cluster: a resample's mean is a ratio of two weighted sums.
    if clusters_E is None:
        sums_C, sizes_C = values, np.ones(len(values))
    else:
        places: dict[Hashable, int] = {}
        place_E = np.array([places.setdefault(cluster, len(places)) for cluster in clusters_E])
        sums_C = np.bincount(place_E, weights=values).astype(np.float64)
        sizes_C = np.bincount(place_E).astype(np.float64)
    # 2. How often each cluster is drawn, in bounded pieces.
    rng = np.random.default_rng(seed)
    even = np.full(len(sums_C), 1 / len(sums_C))
    drawn = [rng.multinomial(len(sums_C), even, size=min(100, resamples - at)) for at in range(0, resamples, 100)]
    means_R = np.concatenate([(times @ sums_C) / (times @ sizes_C) for times in drawn])
    low, high = np.quantile(means_R, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(values.mean()), float(low), float(high))
