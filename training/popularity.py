"""Which items are popular and which are new, by what a training window showed. Pure."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from tailrace.ids import ItemId
from training.examples import Example


@dataclass(frozen=True)
class Popularity:
    """How often each item was shown and clicked in the training window; items never shown are left out."""

    shown: Mapping[ItemId, int]
    clicks: Mapping[ItemId, int]

    def is_new(self, item_id: ItemId) -> bool:
        """Whether the window never showed the item."""
        return item_id not in self.shown

    def self_information(self, item_id: ItemId) -> float:
        """Returns how unexpected the item is, in bits: -log2 of its share of the clicks, one click added to each."""
        return -math.log2((self.clicks.get(item_id, 0) + 1) / self._total)

    @cached_property
    def _total(self) -> int:
        return sum(self.clicks.values()) + len(self.shown) + 1


def count_popularity(examples: Sequence[Example]) -> Popularity:
    """Returns what the examples of a window showed, and what was clicked."""
    shown: Counter[ItemId] = Counter()
    clicks: Counter[ItemId] = Counter()
    for example in examples:
        shown.update(example.item_ids[: example.num_shown])
        clicks.update(
            item_id for item_id, clicked in zip(example.item_ids, example.clicked_N.tolist(), strict=True) if clicked
        )
    return Popularity(shown, clicks)
