"""What a worker sends to Kafka: dead letters, which it waits for, and item counters, which never hold it up."""

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from tailrace.counters import CounterTable, item_stats
from tailrace.events import DeadLetter, encode
from tailrace.ids import ItemId

# Counters encoded and sent in one step of the worker: a few milliseconds.
STATS_CHUNK = 250


def publish_dead_letters(producer: Any, topic: str, letters: Sequence[DeadLetter], timeout_s: float) -> None:
    """Returns once every letter is acknowledged. Raises KafkaError.

    The key is the record's coordinates, so a letter sent again after a crash is the same letter.
    """
    sent = [
        producer.send(topic, key=f"{letter.topic}:{letter.partition}:{letter.offset}".encode(), value=encode(letter))
        for letter in letters
    ]
    for future in sent:
        future.get(timeout=timeout_s)


class ItemStatsPublisher:
    """Publishes the counters that changed, as absolute values, in bounded chunks that nobody waits for.

    One chunk is in flight at a time; what the broker refuses, or does not take, is sent again with its newest values.
    """

    def __init__(self, producer: Any, topic: str, interval_s: float) -> None:
        self.refused = 0
        self._producer = producer
        self._topic = topic
        self._interval_s = interval_s
        self._changed: dict[int, set[ItemId]] = {}
        self._due: deque[tuple[int, ItemId]] = deque()
        self._in_flight: list[tuple[int, ItemId, Any]] = []
        self._next_round_at = 0.0

    def note(self, partition: int, items: Iterable[ItemId]) -> None:
        """Notes that these counters of the partition have changed and been saved."""
        self._changed.setdefault(partition, set()).update(items)

    def forget(self, partition: int) -> None:
        """Publishes nothing more of the partition: it is another worker's now."""
        self._changed.pop(partition, None)
        self._due = deque(entry for entry in self._due if entry[0] != partition)
        self._in_flight = [entry for entry in self._in_flight if entry[0] != partition]

    @property
    def waiting(self) -> bool:
        """Whether a chunk could be sent right now, or soon."""
        return bool(self._due or self._in_flight)

    def partitions_due(self, now_s: float) -> set[int]:
        """Returns the partitions of which the next call of `publish` would send counters."""
        self._settle()
        if not self._due and not self._in_flight and now_s >= self._next_round_at and self._changed:
            self._due.extend((partition, item_id) for partition, items in self._changed.items() for item_id in items)
            self._changed = {}
            self._next_round_at = now_s + self._interval_s
        return set() if self._in_flight else {entry[0] for entry in self._next_chunk()}

    def publish(self, tables: Mapping[int, CounterTable]) -> int:
        """Sends one chunk if none is in flight, and returns how many counters it held. Raises KafkaError."""
        if self._in_flight:
            return 0
        chunk = self._next_chunk()
        for partition, item_id in chunk:
            stats = item_stats(item_id, partition, tables[partition].items[item_id])
            future = self._producer.send(self._topic, key=f"{partition}:{item_id}".encode(), value=encode(stats))
            self._in_flight.append((partition, item_id, future))
            self._due.popleft()
        return len(chunk)

    def _next_chunk(self) -> list[tuple[int, ItemId]]:
        return [self._due[index] for index in range(min(STATS_CHUNK, len(self._due)))]

    def _settle(self) -> None:
        if not all(future.is_done for _, _, future in self._in_flight):
            return
        for partition, item_id, future in self._in_flight:
            if future.failed():
                self.refused += 1
                self.note(partition, [item_id])
        self._in_flight = []

    def drain(self, tables: Mapping[int, CounterTable], timeout_s: float) -> None:
        """Sends everything that has changed and waits for it: the last act of a graceful stop. Raises KafkaError."""
        self._next_round_at = 0.0
        while True:
            for _, _, future in self._in_flight:
                future.get(timeout=timeout_s)
            if not self.partitions_due(0.0):
                return
            self.publish(tables)
