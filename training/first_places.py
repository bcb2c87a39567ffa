"""Who would stand first by some scores, among all logged candidates, and what that says without any label. Pure.

Ties are broken by lot, under a seed, so that equal scores say nothing about order.

Shapes: E examples, N candidates, k first places, D vector size.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist, median

import msgspec
import numpy as np
from numpy.typing import NDArray

from tailrace.ids import ItemId
from training.examples import Example
from training.popularity import Popularity
from training.ranking_metrics import Interval
from training.rescoring import ItemTable

Reals = NDArray[np.float64]


class Sanity(msgspec.Struct, frozen=True):
    """What needs no labels and tells a broken model.

    `not_finite` scores; the median `spread` (standard deviation) of scores within an example; the share of first places
    that the most clicked candidates at hand hold, as many as there are places; the share that new items hold, and how
    many that is.
    """

    not_finite: int
    spread: float
    popular_share: float
    new_share: float
    new_places: int


@dataclass(frozen=True)
class FirstPlaces:
    """Of each example, the candidates' indices in the first places, best first; fewer where there are fewer."""

    examples: Sequence[Example]
    indices_E: list[list[int]]

    @property
    def item_ids(self) -> list[list[ItemId]]:
        """The items by example."""
        return [[one.item_ids[index] for index in of] for one, of in zip(self.examples, self.indices_E, strict=True)]

    def self_information(self, popularity: Popularity) -> tuple[Reals, Reals]:
        """Returns float64 [E] twice: the items' self-information in bits, summed, and how many items there are."""
        bits = [sum(popularity.self_information(item_id) for item_id in items) for items in self.item_ids]
        return np.array(bits, np.float64), np.array([len(of) for of in self.indices_E], np.float64)

    def popular_places(self, popularity: Popularity) -> int:
        """Returns how many places go to candidates that the window clicked no less than any it leaves out."""
        held = 0
        for example, of in zip(self.examples, self.indices_E, strict=True):
            clicks = [popularity.clicks.get(item_id, 0) for item_id in example.item_ids]
            least = max(sorted(clicks, reverse=True)[len(of) - 1], 1) if of else 1
            held += sum(clicks[index] >= least for index in of)
        return held

    def diversities(self, items: ItemTable) -> Reals:
        """Returns float64 [E]: 1 - mean cosine over pairs of the items, NaN below two (Ziegler et al. 2005)."""
        found = np.full(len(self.examples), np.nan)
        for row, (example, of) in enumerate(zip(self.examples, self.indices_E, strict=True)):
            if len(of) > 1:
                vectors_KD = items.vectors_MD[items.rows([example.texts[index] for index in of])].astype(np.float64)
                unit_KD = vectors_KD / np.maximum(np.linalg.norm(vectors_KD, axis=1, keepdims=True), 1e-9)
                found[row] = 1 - (unit_KD @ unit_KD.T)[np.triu_indices(len(of), 1)].mean()
        return found

    def coverage(self, confidence: float) -> Interval:
        """Returns which share of all candidates' items stands first somewhere, with an interval by the jackknife.

        A resample repeats examples and so always sees fewer distinct items: percentiles would lie below the figure.
        """
        candidates = {item_id for example in self.examples for item_id in example.item_ids}
        by_example = [set(items) for items in self.item_ids]
        times: Counter[ItemId] = Counter(item_id for items in by_example for item_id in items)
        alone_E = np.array([sum(times[item_id] == 1 for item_id in items) for items in by_example]) / len(candidates)
        half = NormalDist().inv_cdf((1 + confidence) / 2) * float(np.sqrt((len(alone_E) - 1) * alone_E.var()))
        share = len(times) / len(candidates)
        return Interval(share, max(share - half, 0.0), min(share + half, 1.0))


def stand_first(
    examples: Sequence[Example], scores: Sequence[NDArray[np.floating]], top: int, seed: int
) -> FirstPlaces:
    """Returns the `top` candidates of each example by score; a score that is not a number comes last."""
    rng = np.random.default_rng(seed)
    indices = []
    for scores_N in scores:
        ordered_N = np.where(np.isnan(scores_N), -np.inf, scores_N)
        indices.append(np.lexsort((rng.random(len(scores_N)), -ordered_N))[:top].tolist())
    return FirstPlaces(examples, indices)


def check_sanity(scores: Sequence[NDArray[np.floating]], first: FirstPlaces, popularity: Popularity) -> Sanity:
    """Returns what the scores and the first places say of the model's health."""
    spreads = [float(of.astype(np.float64).std()) if np.isfinite(of).all() else 0.0 for of in scores if len(of) > 1]
    places = [item_id for items in first.item_ids for item_id in items]
    new = sum(popularity.is_new(item_id) for item_id in places)
    return Sanity(
        not_finite=sum(int((~np.isfinite(of)).sum()) for of in scores),
        spread=median(spreads) if spreads else 0.0,
        popular_share=first.popular_places(popularity) / max(len(places), 1),
        new_share=new / max(len(places), 1),
        new_places=new,
    )
