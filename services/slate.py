"""Ranked candidates become a slate: diversity, a cap per tag, a little exploration with known probabilities. Pure.

Diversity is maximal marginal relevance (Carbonell and Goldstein 1998): at each position the candidate that scores
well and resembles least what is already placed. With probability `exploration` a position goes to one of the next
best instead, drawn uniformly; each slot carries the exact probability with which its item was put there, given the
slots before it, so that clicks can be weighed without bias afterwards.

Shapes: N candidates, D vector size, n slots.
"""

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating]
Rows = NDArray[np.int64]
Flags = NDArray[np.bool_]


@dataclass(frozen=True)
class Slot:
    """One place of a slate. `index` is into the candidates, `score` the model's own.

    `propensity` is the probability of this item at this position given the slots before. `relaxed` says that the cap
    per tag had to be lifted to fill the place.
    """

    index: int
    position: int
    score: float
    propensity: float
    explored: bool
    relaxed: bool


def build_slate(
    scores_N: Floats,
    vectors_ND: Floats,
    tags_N: Sequence[Collection[str]],
    *,
    n: int,
    diversity: float,
    max_per_tag: int,
    exploration: float,
    explore_pool: int,
    rng: np.random.Generator,
) -> list[Slot]:
    """Returns min(n, N) slots in order.

    `diversity` 0 is pure relevance and 1 pure novelty; `max_per_tag` 0 means no cap. Vectors need not be of unit
    length; a zero vector resembles nothing. A score that is not a number ranks last.
    """
    # 1. Relevance on a scale that does not depend on the model's: 0 for the best, -1 at the end of those in reach.
    relevance_N = _relevance(scores_N, reach=max(4 * n, explore_pool))
    unit_ND = _unit(vectors_ND)
    likeness_N = np.zeros(len(scores_N))
    placed_N = np.zeros(len(scores_N), dtype=np.bool_)
    tag_counts: Counter[str] = Counter()
    slots: list[Slot] = []
    for position in range(min(n, len(scores_N))):
        # 2. Who may stand here; the cap gives way before the slate stays short.
        eligible, relaxed = _eligible(placed_N, tags_N, tag_counts, max_per_tag)
        # 3. The order in which they would be taken, and the probability of each.
        value_N = (1 - diversity) * relevance_N - diversity * likeness_N
        in_order = eligible[np.argsort(-value_N[eligible], kind="stable")]
        probabilities = place_probabilities(len(in_order), exploration, explore_pool)
        # 4. Draw, place, and note what the next position must differ from.
        drawn = draw(probabilities, rng.random())
        index = int(in_order[drawn])
        slots.append(Slot(index, position, float(scores_N[index]), float(probabilities[drawn]), drawn > 0, relaxed))
        placed_N[index] = True
        tag_counts.update(set(tags_N[index]))
        likeness_N = np.maximum(likeness_N, unit_ND @ unit_ND[index])
    return slots


def place_probabilities(num_eligible: int, exploration: float, explore_pool: int) -> Floats:
    """Returns float64 [num_eligible]: the probability of each, best first, to be put at the position; they sum to 1.

    >>> place_probabilities(4, 0.2, 2).tolist()
    [0.8, 0.1, 0.1, 0.0]
    """
    probabilities = np.zeros(num_eligible)
    others = min(explore_pool, num_eligible - 1)
    probabilities[0] = 1.0 if others <= 0 else 1.0 - exploration
    if others > 0:
        probabilities[1 : 1 + others] = exploration / others
    return probabilities


def draw(probabilities: Floats, uniform: float) -> int:
    """Returns the index that a uniform number in [0, 1) falls on; never one of probability 0."""
    reached = int(np.searchsorted(np.cumsum(probabilities), uniform, side="right"))
    return min(reached, int(np.flatnonzero(probabilities)[-1]))


def _eligible(
    placed_N: Flags, tags_N: Sequence[Collection[str]], tag_counts: Counter[str], max_per_tag: int
) -> tuple[Rows, bool]:
    left = np.flatnonzero(~placed_N)
    full = {tag for tag, count in tag_counts.items() if count >= max_per_tag} if max_per_tag > 0 else set()
    if not full:
        return left, False
    within = np.array([full.isdisjoint(tags_N[index]) for index in left.tolist()], dtype=np.bool_)
    return (left[within], False) if within.any() else (left, True)


def _relevance(scores_N: Floats, reach: int) -> Floats:
    finite_N = np.nan_to_num(scores_N.astype(np.float64), nan=-1e9, posinf=1e9, neginf=-1e9)
    if not len(finite_N):
        return finite_N
    best_first = -np.sort(-finite_N)
    spread = best_first[0] - best_first[min(reach, len(finite_N)) - 1]
    relevance_N: Floats = (finite_N - best_first[0]) / (spread if spread > 0 else 1.0)
    return relevance_N


def _unit(vectors_ND: Floats) -> Floats:
    wide = np.nan_to_num(vectors_ND.astype(np.float32))
    result: Floats = wide / np.maximum(np.linalg.norm(wide, axis=-1, keepdims=True), 1e-9)
    return result
