"""Item counters: decayed sums at five half-lives, last touches, co-visits and last visitors. Pure.

Method: exponentially decayed sums (Cohen and Strauss 2003). A sum is held at the time of its newest
contribution; a late contribution is decayed to that time before it is added, so order within a stream decides
nothing but rounding. Each kind is fed by exactly one stream: that makes the state independent of how the
streams of a partition interleave, byte for byte.
"""

from bisect import insort
from collections.abc import Iterable
from math import exp2
from zlib import crc32

import msgspec

from tailrace.events import DecayedSum, ItemStats
from tailrace.ids import ItemId, UserId

HALF_LIVES_S = (900.0, 3_600.0, 21_600.0, 86_400.0, 604_800.0)
_HALF_LIVES_MS = tuple(seconds * 1000 for seconds in HALF_LIVES_S)

# shown: impressions. clicked, liked, skipped, users (a user's first touch): clicks. rated, rated_up: ratings.
KINDS = ("shown", "clicked", "liked", "skipped", "users", "rated", "rated_up")

MAX_TOUCHES = 8
MAX_COVISITS = 32
MAX_VISITORS = 32
VISITOR_BUCKETS = 65_536
_COVISIT_HALF_LIFE_MS = 7 * 86_400_000.0


class ItemCounters(msgspec.Struct, array_like=True):
    """One partition's counters of one item. Mutable; owned by the worker of the partition."""

    sums: dict[str, DecayedSum] = {}
    touches_ms: list[int] = []
    first_ms: int | None = None
    covisits: dict[ItemId, tuple[int, float]] = {}
    visitors: list[tuple[int, int]] = []  # (first touch, bucket of the user), oldest first


class CounterTable:
    """The counters of one partition, and which of them have changed since they were last taken."""

    def __init__(self, items: dict[ItemId, ItemCounters] | None = None) -> None:
        self.items = items if items is not None else {}
        self.dirty: set[ItemId] = set()

    def touch(self, item_id: ItemId) -> ItemCounters:
        """Returns the item's counters to be changed; marks them dirty."""
        self.dirty.add(item_id)
        found = self.items.get(item_id)
        if found is None:
            found = self.items[item_id] = ItemCounters()
        return found


def apply_count(counters: ItemCounters, kind: str, at_ms: int, weight: float = 1.0) -> None:
    """Adds `weight` at `at_ms` to the item's decayed sums of `kind`, in place."""
    held = counters.sums.get(kind)
    if held is None:
        sums_by_kind = counters.sums | {kind: DecayedSum(at_ms, [weight] * len(_HALF_LIVES_MS), 1)}
        # In the order of KINDS, not of arrival: arrival depends on how the streams of a partition interleave.
        counters.sums = {name: sums_by_kind[name] for name in KINDS if name in sums_by_kind}
        return
    a, b, c, d, e = held.sums  # one per half-life; written out, because this is the hottest line of the stream
    h, i, j, k, m = _HALF_LIVES_MS
    age = at_ms - held.at_ms
    if age > 0:
        held.sums = [
            a * exp2(-age / h) + weight,
            b * exp2(-age / i) + weight,
            c * exp2(-age / j) + weight,
            d * exp2(-age / k) + weight,
            e * exp2(-age / m) + weight,
        ]
        held.at_ms = at_ms
    else:
        held.sums = [
            a + weight * exp2(age / h),
            b + weight * exp2(age / i),
            c + weight * exp2(age / j),
            d + weight * exp2(age / k),
            e + weight * exp2(age / m),
        ]
    held.count += 1


def apply_touch(counters: ItemCounters, at_ms: int) -> None:
    """Notes that someone touched the item: its first time and its newest eight, in time order."""
    if counters.first_ms is None or at_ms < counters.first_ms:
        counters.first_ms = at_ms
    touches = counters.touches_ms
    touches.append(at_ms)
    if len(touches) > 1 and touches[-2] > at_ms:
        touches.sort()
    if len(touches) > MAX_TOUCHES:
        del touches[0]


def apply_covisit(counters: ItemCounters, other: ItemId, at_ms: int) -> None:
    """Notes that a user touched this item and `other` close together; of more than 32 pairs the weaker half goes.

    So a newcomer has the time of sixteen others to be seen again (lossy counting, Manku and Motwani 2002).
    """
    covisits = counters.covisits
    held = covisits.get(other)
    if held is None:
        covisits[other] = (at_ms, 1.0)
        if len(covisits) > MAX_COVISITS:
            counters.covisits = _strongest(covisits)
    elif at_ms >= held[0]:
        covisits[other] = (at_ms, held[1] * exp2((held[0] - at_ms) / _COVISIT_HALF_LIFE_MS) + 1.0)
    else:
        covisits[other] = (held[0], held[1] + exp2((at_ms - held[0]) / _COVISIT_HALF_LIFE_MS))


def visitor_bucket(user_id: UserId) -> int:
    """Returns the number under which an item remembers a user: one in 65,536, so that it names nobody.

    >>> visitor_bucket(UserId("ada"))
    34664
    """
    return crc32(user_id.encode()) % VISITOR_BUCKETS


def apply_visitor(counters: ItemCounters, bucket: int, at_ms: int) -> None:
    """Notes a user's first touch of the item, under the user's bucket; the newest 32 are kept, in time order."""
    visitors = counters.visitors
    if not visitors or visitors[-1] <= (at_ms, bucket):
        visitors.append((at_ms, bucket))
    else:
        insort(visitors, (at_ms, bucket))
    if len(visitors) > MAX_VISITORS:
        del visitors[0]


def _strongest(covisits: dict[ItemId, tuple[int, float]]) -> dict[ItemId, tuple[int, float]]:
    now_ms, _ = max(covisits.values())
    ranked = sorted(
        [
            (-weight * exp2((held_ms - now_ms) / _COVISIT_HALF_LIFE_MS), item)
            for item, (held_ms, weight) in covisits.items()
        ]
    )
    return {item: covisits[item] for _, item in ranked[: MAX_COVISITS // 2]}


def decayed(held: tuple[int, float], at_ms: int) -> float:
    """Returns the weight of a co-visit at `at_ms`."""
    return held[1] * exp2(-max(at_ms - held[0], 0) / _COVISIT_HALF_LIFE_MS)


def add_decayed(parts: Iterable[DecayedSum]) -> DecayedSum:
    """Returns the sum of several partitions' shares, held at the newest of their times."""
    shares = list(parts)
    at_ms = max(share.at_ms for share in shares)
    sums = [
        sum(share.sums[index] * exp2((share.at_ms - at_ms) / half_life) for share in shares)
        for index, half_life in enumerate(_HALF_LIVES_MS)
    ]
    return DecayedSum(at_ms, sums, sum(share.count for share in shares))


def item_stats(item_id: ItemId, partition: int, counters: ItemCounters) -> ItemStats:
    """Returns the record that publishes one partition's counters of an item."""
    return ItemStats(
        item_id=item_id,
        partition=partition,
        sums=counters.sums,
        touches_ms=counters.touches_ms,
        first_ms=counters.first_ms,
        covisits=counters.covisits,
        visitors=counters.visitors,
    )


_decoder = msgspec.msgpack.Decoder(ItemCounters)
_encoder = msgspec.msgpack.Encoder()


def encode_counters(counters: ItemCounters) -> bytes:
    """Returns the counters as they are stored."""
    return _encoder.encode(counters)


def decode_counters(data: bytes) -> ItemCounters:
    """Returns stored counters."""
    return _decoder.decode(data)
