"""Which items stand under which interest keys, by row of the catalogue, both ways, and their tags by bucket.

Not safe by itself: whoever writes or reads holds the catalogue's lock, but for `topics`, whose answers never change.

Shapes: R rows ever used, K tags of an item.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tailrace.items import TAG, Item
from tailrace.tastes import MOST_TAGS, NO_TAG, TagBuckets, bucket_tags, tags_of

_FIRST_ROWS = 1024


class Topics(NamedTuple):
    """One item's interest keys, each once."""

    tags: tuple[str, ...] = ()
    entities: tuple[str, ...] = ()

    @property
    def keys(self) -> tuple[str, ...]:
        """Both, tags first."""
        return self.tags + self.entities


class TopicIndex:
    """The interest keys of every row, and the rows of every interest key."""

    def __init__(self) -> None:
        self._topics: list[Topics] = []
        self._rows: dict[str, set[int]] = {}
        self._arrays: dict[str, NDArray[np.int64]] = {}  # made when first asked for
        self._tags: TagBuckets = np.full((_FIRST_ROWS, MOST_TAGS), NO_TAG, dtype=np.int16)
        self._roots: NDArray[np.float32] = np.ones((_FIRST_ROWS, 2), dtype=np.float32)

    def add_row(self) -> None:
        """Adds a free row at the end."""
        if len(self._topics) == len(self._tags):
            self._tags = np.concatenate([self._tags, np.full_like(self._tags, NO_TAG)])
            self._roots = np.concatenate([self._roots, np.ones_like(self._roots)])
        self._topics.append(Topics())

    def put(self, row: int, item: Item) -> None:
        """Makes `row` the item's, whatever stood there."""
        self.clear(row)
        keys = dict.fromkeys(item.topics_of_interest)
        self._topics[row] = Topics(
            tags=tuple(key for key in keys if key.startswith(TAG)),
            entities=tuple(key for key in keys if not key.startswith(TAG)),
        )
        self._tags[row] = bucket_tags([tags_of(item)])[0]
        self._roots[row] = [max(len(keys), 1) ** 0.5 for keys in self._topics[row]]
        for key in keys:
            self._rows.setdefault(key, set()).add(row)
            self._arrays.pop(key, None)

    def clear(self, row: int) -> None:
        """Takes a row from under its keys."""
        for key in self._topics[row].keys:
            rows = self._rows[key]
            rows.discard(row)
            self._arrays.pop(key, None)
            if not rows:
                del self._rows[key]
        self._topics[row] = Topics()
        self._tags[row] = NO_TAG

    def topics(self, row: int) -> Topics:
        """Returns a row's interest keys, none where it is free."""
        return self._topics[row]

    def rows(self, key: str) -> NDArray[np.int64]:
        """Returns int64: the rows under an interest key, ascending. Do not write to it."""
        held = self._arrays.get(key)
        if held is None:
            held = np.array(sorted(self._rows.get(key, ())), dtype=np.int64)
            if key in self._rows:
                self._arrays[key] = held
        return held

    def roots(self) -> NDArray[np.float32]:
        """Returns float32 [R,2], a copy: the root of how many tags and how many entities every row has, 1 for none."""
        return self._roots[: len(self._topics)].copy()

    def tags(self) -> TagBuckets:
        """Returns int16 [R,K], a copy: the tags of every row by bucket, NO_TAG where there is none."""
        return self._tags[: len(self._topics)].copy()
