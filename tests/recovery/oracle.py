"""What the state must be: the whole log, read once and folded in memory by nobody who ever dies.

It shares `tailrace.fold` with the worker and nothing else: which records may be folded is decided here a second time.
"""

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

from kafka import TopicPartition

from tailrace.counters import CounterTable, decode_counters, encode_counters, item_stats
from tailrace.errors import InvalidRecord
from tailrace.events import ItemStats, decode_event, encode
from tailrace.fold import STREAMS, Outcome, fold_erasure, fold_event
from tailrace.ids import ItemId, UserId
from tailrace.items import Item, decode_item
from tailrace.kafka_clients import open_consumer
from tailrace.profile import Profile, decode_profile, encode_profile
from tailrace.settings import Settings
from tailrace.stores.store import Store
from tailrace.topics import tailrace_topics


@dataclass
class Folded:
    """The state of every partition, encoded, and what became of the records."""

    profiles: dict[int, dict[UserId, bytes]] = field(default_factory=lambda: defaultdict(dict))
    counters: dict[int, dict[ItemId, bytes]] = field(default_factory=lambda: defaultdict(dict))
    offsets: dict[int, dict[str, int]] = field(default_factory=lambda: defaultdict(dict))
    dead_letters: set[str] = field(default_factory=set)
    event_ids: set[tuple[str, str]] = field(default_factory=set)  # (stream, event id), of users never erased
    erased: set[str] = field(default_factory=set)
    events: int = 0
    repeated: int = 0


def read_topic(settings: Settings, role: str) -> dict[int, list[Any]]:
    """Returns every record of a topic by partition, in offset order."""
    topic = tailrace_topics(settings.kafka)[role]
    partitions = [TopicPartition(topic.name, number) for number in range(topic.partitions)]
    consumer = open_consumer(settings.kafka, max_poll_records=20_000, fetch_max_wait_ms=20)
    found: dict[int, list[Any]] = {place.partition: [] for place in partitions}
    try:
        consumer.assign(partitions)
        consumer.seek_to_beginning(*partitions)
        ends = consumer.end_offsets(partitions)
        while any(consumer.position(place) < end for place, end in ends.items()):
            for place, records in consumer.poll(timeout_ms=200).items():
                found[place.partition] += records
    finally:
        consumer.close()
    return found


def fold_log(settings: Settings) -> Folded:
    """Returns what the workers' store must hold, byte for byte, once they have reached the end of the log."""
    items: dict[str, Item] = {}
    for records in read_topic(settings, "items").values():
        items |= {record.key.decode(): decode_item(record.value) for record in records}
    logs = {stream: read_topic(settings, stream) for stream in STREAMS}
    folded = Folded()
    folded.erased = {
        record.key.decode()
        for log in logs.values()
        for records in log.values()
        for record in records
        if record.value is None
    }
    for partition in range(settings.kafka.user_partitions):
        profiles: dict[UserId, Profile] = {}
        touched: set[UserId] = set()
        counters = CounterTable()
        for stream in STREAMS:
            records = logs[stream][partition]
            folded.offsets[partition][stream] = records[-1].offset + 1 if records else 0
            for record in records:
                user_id = UserId(record.key.decode())
                profile = profiles.setdefault(user_id, Profile(user_id))
                if record.value is None:
                    profiles[user_id] = fold_erasure(profile, record.timestamp, (stream,))
                    touched.add(user_id)
                    continue
                try:
                    event = decode_event(stream, record.value)
                except InvalidRecord:
                    event = None
                if (
                    event is None
                    or event.user_id != user_id
                    or event.at_ms > record.timestamp + settings.stream.max_ahead_s * 1000
                ):
                    folded.dead_letters.add(f"{record.topic}:{partition}:{record.offset}")
                    continue
                outcome = fold_event(event, profile, counters, items.get(getattr(event, "item_id", "")))
                if outcome is Outcome.APPLIED:
                    touched.add(user_id)
                folded.events += outcome is Outcome.APPLIED
                folded.repeated += outcome is Outcome.REPEATED
                if user_id not in folded.erased:
                    folded.event_ids.add((stream, event.event_id))
        folded.profiles[partition] = {user_id: encode_profile(profiles[user_id]) for user_id in touched}
        folded.counters[partition] = {item_id: encode_counters(found) for item_id, found in counters.items.items()}
    return folded


def assert_state_equals_log(settings: Settings, store: Store) -> Folded:
    """Compares the store with a pure fold of the log, byte for byte; returns the fold. Raises AssertionError."""
    folded = fold_log(settings)
    counted = 0
    for partition in range(settings.kafka.user_partitions):
        stored = store.load_profiles(partition, store.load_users(partition))
        expected = folded.profiles[partition]
        assert stored.keys() == expected.keys(), f"partition {partition}: other users"
        for user_id, data in expected.items():
            assert stored[user_id] == data, (
                f"{user_id}: {decode_profile(stored[user_id])} is not {decode_profile(data)}"
            )
        assert store.load_counters(partition) == folded.counters[partition], f"partition {partition}: counters differ"
        offsets = {stream: offset.next_offset for stream, offset in store.load_offsets(partition).items()}
        assert offsets == folded.offsets[partition], f"partition {partition}: offsets differ"
        counted += sum(decode_profile(data).events for user, data in stored.items() if user not in folded.erased)
    # Counted without the fold: each event id of the log exactly once.
    assert counted == len(folded.event_ids), f"{counted} events in the profiles, {len(folded.event_ids)} in the log"
    letters = {record.key.decode() for records in read_topic(settings, "dead-letters").values() for record in records}
    assert letters == folded.dead_letters
    return folded


def assert_stats_equal_counters(settings: Settings, store: Store) -> None:
    """Compares the newest `item-stats` with the counters in the store. Raises AssertionError."""
    published = {
        record.key.decode(): record.value
        for records in read_topic(settings, "item-stats").values()
        for record in records
    }
    expected = {
        f"{partition}:{item_id}": encode(_stats(item_id, partition, data))
        for partition in range(settings.kafka.user_partitions)
        for item_id, data in store.load_counters(partition).items()
    }
    assert published == expected


def _stats(item_id: ItemId, partition: int, data: bytes) -> ItemStats:
    return item_stats(item_id, partition, decode_counters(data))
