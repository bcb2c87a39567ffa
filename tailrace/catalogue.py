"""The table of items and their counters, in memory, fed by the records of `items` and `item-stats`.

Every item has a row; numbers live in arrays by row, so features are gathered for hundreds of candidates at once.
One lock: the threads that apply records hold it for one record, readers hold it while they copy the rows they ask for.
What a reader gets is a copy or immutable. Rows of removed items are given to other items no sooner than a
minute of record time later, so that a request in flight never mistakes one item for another.

Shapes: R rows ever used, N asked for, K kinds (`counters.KINDS`), H half-lives (`counters.HALF_LIVES_S`), T touches, V
visitors.
"""

import threading
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
from numpy.typing import NDArray

from tailrace.counter_columns import NEVER_MS, CounterColumns
from tailrace.counters import HALF_LIVES_S, decayed
from tailrace.errors import InvalidRecord
from tailrace.events import ItemStats, decode
from tailrace.ids import ItemId
from tailrace.items import Item, decode_item
from tailrace.tastes import TagBuckets
from tailrace.topic_index import TopicIndex, Topics

Rows = NDArray[np.int64]
Floats = NDArray[np.float32]
Times = NDArray[np.int64]
Flags = NDArray[np.bool_]
Buckets = NDArray[np.int32]

_REUSE_AFTER_MS = 60_000
_FIRST_ROWS = 1024
_stats_decoder = msgspec.json.Decoder(ItemStats)


@dataclass(frozen=True)
class ItemRows:
    """Copies of some rows. `sums_NKH` is decayed to the moment asked for; times are epoch ms, NEVER_MS for none.

    Visitors are buckets (`counters.visitor_bucket`), NOBODY for none.
    """

    sums_NKH: Floats
    created_ms_N: Times
    first_ms_N: Times
    touches_ms_NT: Times  # newest first
    visitors_NV: Buckets  # newest first
    visits_ms_NV: Times  # when each of them first came


class Catalogue:
    """Items and their counters by row. `apply_item` and `apply_stats` fit `table_reader.ApplyRecord`.

    Counters of an item that has not been announced wait for it, for `max_unannounced` items at most; the one that has
    waited longest gives way and is counted in `forgotten`.
    """

    def __init__(self, *, max_unannounced: int = 10_000) -> None:
        self.forgotten = 0
        self._max_unannounced = max_unannounced
        self._lock = threading.RLock()
        self._row_of: dict[ItemId, int] = {}
        self._items: list[Item | None] = []
        self._index = TopicIndex()
        self._free: deque[tuple[int, int]] = deque()  # (row, when freed)
        self._covisits: dict[ItemId, tuple[int, dict[ItemId, float]]] = {}  # added up when first asked for
        self._partials: dict[ItemId, dict[int, ItemStats]] = {}
        self._unannounced: dict[ItemId, None] = {}  # oldest first
        self._version = 0
        self._announced_ms: Times = np.full(_FIRST_ROWS, NEVER_MS, dtype=np.int64)
        self._created_ms: Times = np.full(_FIRST_ROWS, NEVER_MS, dtype=np.int64)
        self._counters = CounterColumns(_FIRST_ROWS)
        self._versions: Times = np.zeros(_FIRST_ROWS, dtype=np.int64)

    # Writing: one thread per topic.

    def apply_item(self, item_id: str, value: bytes | None, at_ms: int) -> None:
        """Adds or changes an item, or removes it where `value` is None. Raises InvalidRecord naming the field."""
        key = ItemId(item_id)
        if value is None:
            with self._lock:
                self._remove(key, at_ms)
            return
        item = decode_item(value)
        if item.item_id != key:
            raise InvalidRecord(f"the record's key is {item_id!r}", field="$.item_id")
        with self._lock:
            row = self._row_of.get(key)
            if row is None:
                row = self._new_row(key, at_ms)
            elif self._items[row] == item:
                return
            self._put(row, item)

    def apply_stats(self, key: str, value: bytes | None, at_ms: int) -> None:
        """Takes one partition's share of an item's counters (key `partition:item_id`), or drops it where None.

        Shares are absolute: the newest record of a key replaces the one before. Raises InvalidRecord.
        """
        partition, _, item_id = key.partition(":")
        if not partition.isdecimal() or not item_id:
            raise InvalidRecord("an item-stats key is partition:item_id", field="key")
        stats = None if value is None else decode(_stats_decoder, value)
        if stats is not None and any(len(held.sums) != len(HALF_LIVES_S) for held in stats.sums.values()):
            raise InvalidRecord(f"expected {len(HALF_LIVES_S)} half-lives", field="$.sums")
        with self._lock:
            partials = self._partials.setdefault(ItemId(item_id), {})
            self._covisits.pop(ItemId(item_id), None)
            if stats is None:
                partials.pop(int(partition), None)
            else:
                partials[int(partition)] = stats
            row = self._row_of.get(ItemId(item_id))
            if row is None:
                self._await_item(ItemId(item_id))
            else:
                self._add_partials(row, ItemId(item_id))

    # Reading: any thread.

    def __len__(self) -> int:
        """How many items can be recommended."""
        return len(self._row_of)

    @property
    def num_rows(self) -> int:
        """R: rows ever used. Arrays by row that others keep (item vectors) need at least this many."""
        return len(self._items)

    @property
    def item_ids(self) -> list[ItemId]:
        """Every item, in the order of announcement."""
        with self._lock:
            return list(self._row_of)

    def item(self, item_id: ItemId) -> Item | None:
        """Returns the item, or None where it is unknown or was removed. Fits `text.ItemOf`."""
        row = self._row_of.get(item_id)
        return None if row is None else self._items[row]

    def row(self, item_id: ItemId) -> int | None:
        """Returns the item's row."""
        return self._row_of.get(item_id)

    def rows(self, item_ids: Iterable[ItemId]) -> Rows:
        """Returns int64 [N]: the rows of those of the items that are known, in the order given."""
        row_of = self._row_of
        return np.array([row for item_id in item_ids if (row := row_of.get(item_id)) is not None], dtype=np.int64)

    def items_at(self, rows: Sequence[int] | Rows) -> list[Item | None]:
        """Returns the items in these rows, None where a row is free."""
        items = self._items
        return [items[row] for row in rows]

    def topics(self, item_id: ItemId) -> tuple[str, ...]:
        """Returns an item's interest keys, none where it is unknown."""
        row = self._row_of.get(item_id)
        return () if row is None else self._index.topics(row).keys

    def topics_at(self, rows: Sequence[int] | Rows) -> list[tuple[str, ...]]:
        """Returns each row's interest keys (`tag:gothic`, `author:Mary Shelley`), none where a row is free."""
        return [topics.keys for topics in self.split_topics_at(rows)]

    def split_topics_at(self, rows: Sequence[int] | Rows) -> list[Topics]:
        """Returns each row's interest keys, tags and entities apart."""
        return [self._index.topics(row) for row in rows]

    def live_rows(self) -> Rows:
        """Returns int64: every row that holds an item, ascending."""
        with self._lock:
            return np.flatnonzero(self._announced_ms[: len(self._items)] != NEVER_MS)

    def topic_rows(self, key: str) -> Rows:
        """Returns int64: the rows of the items under an interest key, ascending. Do not write to it."""
        with self._lock:
            return self._index.rows(key)

    def topic_roots(self) -> Floats:
        """Returns float32 [R,2]: the root of how many tags and how many entities every row has, 1 for none."""
        with self._lock:
            return self._index.roots()

    def tags(self) -> TagBuckets:
        """Returns int16 [R,K]: the tags of every row by bucket, as a ranker takes them (`tailrace.tastes`)."""
        with self._lock:
            return self._index.tags()

    def changed_since(self, version: int) -> tuple[Rows, int]:
        """Returns the rows whose item came, changed or went after `version`, and the version that this brings you to.

        Start at 0. Each reader keeps its own version: this is how a loaded model knows which items to encode.
        """
        with self._lock:
            return np.flatnonzero(self._versions[: len(self._items)] > version), self._version

    def gather(self, rows: Rows, now_ms: int) -> ItemRows:
        """Returns copies of the rows' numbers, sums decayed to `now_ms`, from one moment."""
        with self._lock:
            return ItemRows(
                sums_NKH=self._counters.sums(rows, now_ms),
                created_ms_N=self._created_ms[rows],
                first_ms_N=self._counters.first_ms[rows],
                touches_ms_NT=self._counters.touches_ms[rows],
                visitors_NV=self._counters.visitors[rows],
                visits_ms_NV=self._counters.visits_ms[rows],
            )

    def visitors(self, rows: Rows) -> Buckets:
        """Returns int32 [N, V]: who first touched these rows' items last, by bucket, NOBODY where nobody did."""
        with self._lock:
            found: Buckets = self._counters.visitors[rows]
            return found

    def decayed_sums(self, rows: Rows, now_ms: int) -> Floats:
        """Returns float32 [N, K, H]: the rows' sums decayed to `now_ms`."""
        return self.gather(rows, now_ms).sums_NKH

    def trend(self, kind: str, half_life: int, now_ms: int) -> Floats:
        """Returns float32 [R]: every row's sum of one kind at one half-life (an index of HALF_LIVES_S)."""
        with self._lock:
            return self._counters.trend(kind, half_life, now_ms)[: len(self._items)]

    def created_ms(self) -> Times:
        """Returns int64 [R]: when every row's item became available; NEVER_MS in a free row."""
        with self._lock:
            return self._created_ms[: len(self._items)].copy()

    def covisits(self, item_id: ItemId, now_ms: int) -> dict[ItemId, float]:
        """Returns what users of this item touched close to it, with decayed weights added over partitions."""
        with self._lock:
            held_ms, weights = self._covisits.get(item_id) or self._add_covisits(item_id)
        share = decayed((held_ms, 1.0), now_ms)
        return {other: weight * share for other, weight in weights.items()}

    # What writing is made of; the lock is held.

    def _new_row(self, item_id: ItemId, at_ms: int) -> int:
        if self._free and at_ms - self._free[0][1] >= _REUSE_AFTER_MS:
            row, _ = self._free.popleft()
        else:
            row = len(self._items)
            if row == len(self._versions):
                self._grow()
            self._index.add_row()
            self._items.append(None)
        self._announced_ms[row] = at_ms
        self._unannounced.pop(item_id, None)
        self._row_of[item_id] = row
        return row

    def _put(self, row: int, item: Item) -> None:
        self._items[row] = item
        self._index.put(row, item)
        self._add_partials(row, item.item_id)
        self._mark(row)

    def _remove(self, item_id: ItemId, at_ms: int) -> None:
        row = self._row_of.pop(item_id, None)
        if row is None:
            return
        self._covisits.pop(item_id, None)
        self._items[row] = None
        self._index.clear(row)
        self._announced_ms[row] = self._created_ms[row] = NEVER_MS
        self._counters.put(row, ())
        self._free.append((row, at_ms))
        self._mark(row)
        if item_id in self._partials:
            self._await_item(item_id)

    def _mark(self, row: int) -> None:
        self._version += 1
        self._versions[row] = self._version

    def _await_item(self, item_id: ItemId) -> None:
        if not self._partials[item_id]:
            del self._partials[item_id]
            self._unannounced.pop(item_id, None)
            return
        self._unannounced.setdefault(item_id)
        if len(self._unannounced) > self._max_unannounced:
            oldest = next(iter(self._unannounced))
            del self._unannounced[oldest], self._partials[oldest]
            self.forgotten += 1

    def _add_partials(self, row: int, item_id: ItemId) -> None:
        self._counters.put(row, list(self._partials.get(item_id, {}).values()))
        # An item without a date of its own is as old as its first announcement or touch.
        first_ms = int(self._counters.first_ms[row])
        item = self._items[row]
        known = None if item is None else item.created_ms
        announced_ms = int(self._announced_ms[row])
        self._created_ms[row] = (
            known if known is not None else announced_ms if first_ms == NEVER_MS else min(announced_ms, first_ms)
        )

    def _add_covisits(self, item_id: ItemId) -> tuple[int, dict[ItemId, float]]:
        pairs = [pair for partial in self._partials.get(item_id, {}).values() for pair in partial.covisits.items()]
        newest_ms = max((held[0] for _, held in pairs), default=0)
        weights: dict[ItemId, float] = {}
        for other, held in pairs:
            weights[other] = weights.get(other, 0.0) + decayed(held, newest_ms)
        if item_id in self._row_of:
            self._covisits[item_id] = (newest_ms, weights)
        return newest_ms, weights

    def _grow(self) -> None:
        self._counters.grow()
        for name, empty in {"_announced_ms": NEVER_MS, "_created_ms": NEVER_MS, "_versions": 0}.items():
            old = getattr(self, name)
            setattr(self, name, np.concatenate([old, np.full_like(old, empty)]))
