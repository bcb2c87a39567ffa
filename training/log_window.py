"""Reads a bounded window of the log and returns examples: Kafka at the edge, `training.examples` in the middle.

The log itself is the reservoir: a round reads `window_s` of it, keeps the newest examples since the champion's own
cut-off and a sample of older ones. So no second copy of personal data has to be kept and erased, and a round is a pure
function of offsets and parent; the alternative, a stored reservoir, would be cheaper to read and neither of these.

Two clocks. WHERE the window lies, and what in it has not been read yet, goes by the time of the records, when they
were logged: imported history is years old by its own time, and yet new to the log. WHAT happened after what, waiting,
attribution, age, the order of examples, and so what the last round has learned from, goes by the events' own time. A
record's time may run behind its arrival by no more than `wait_s`: an impression that was on its way to the log at the
last cut-off is then fresh in the next round.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import msgspec
import pandas as pd
from kafka import TopicPartition
from kafka.errors import KafkaError

from tailrace.errors import BrokerUnavailable, InvalidRecord
from tailrace.events import Click, Impression, Rating, decode_event
from tailrace.ids import RequestId, UserId
from tailrace.kafka_clients import open_consumer
from tailrace.settings import KafkaSettings, TrainingSettings
from tailrace.topics import tailrace_topics
from training.attribution import feedback_table
from training.examples import Example, JoinCounts, Joining
from training.reservoir import Selection

Progress = Callable[[str, int, int], None]  # what is read, records done, records in all

STREAMS = ("clicks", "ratings", "impressions")
CHUNK = 500  # records decoded at once: impressions are about 20 kB each
_PATIENCE_S = 30.0


class AlreadyRead(msgspec.Struct, frozen=True, kw_only=True):
    """What the champion's own round has learned from: impressions shown before `learned_until_ms`, of those that had
    been logged by `cutoff_ms`, where its window ended.
    """

    learned_until_ms: int
    cutoff_ms: int


class LogWindow(msgspec.Struct, frozen=True, kw_only=True):
    """Which records a round reads: per "stream:partition" from the first offset up to, not including, the second.

    All that is not `already` learned from is fresh. It goes into the bundle's training record.
    """

    since_ms: int
    cutoff_ms: int
    already: AlreadyRead | None = None
    offsets: dict[str, tuple[int, int]]

    @property
    def num_records(self) -> int:
        """How many records it spans at most."""
        return sum(max(end - begin, 0) for begin, end in self.offsets.values())

    @property
    def partitions(self) -> list[int]:
        """The partitions it covers."""
        return sorted({int(name.rpartition(":")[2]) for name in self.offsets})


class Window(NamedTuple):
    """What a round learns from, each oldest first, and what became of all records of the window."""

    fresh: list[Example]
    replay: list[Example]
    counts: JoinCounts


def plan_window(
    kafka: KafkaSettings, training: TrainingSettings, *, now_ms: int, already: AlreadyRead | None
) -> LogWindow:
    """Returns the window that ends now. What is logged from here on is not in it. Raises BrokerUnavailable."""
    since_ms = max(now_ms - round(training.window_s * 1000), 0)
    topics = tailrace_topics(kafka)
    names = {
        f"{stream}:{index}": TopicPartition(topics[stream].name, index)
        for stream in STREAMS
        for index in range(topics[stream].partitions)
    }
    consumer = open_consumer(kafka)
    try:
        # The end of the log, not an offset by time: one record stamped far ahead would hide all that follow it.
        ends = consumer.end_offsets(list(names.values()))
        begins = consumer.offsets_for_times(dict.fromkeys(names.values(), since_ms))
    except KafkaError as error:
        raise BrokerUnavailable(f"Kafka at {kafka.bootstrap_servers} failed: {error}") from error
    finally:
        consumer.close()
    offsets = {
        name: (ends[place] if begins.get(place) is None else min(begins[place].offset, ends[place]), ends[place])
        for name, place in names.items()
    }
    return LogWindow(since_ms=since_ms, cutoff_ms=now_ms, already=already, offsets=offsets)


def read_examples(
    kafka: KafkaSettings,
    window: LogWindow,
    training: TrainingSettings,
    *,
    seed: int,
    progress: Progress | None = None,
    chunk: int = CHUNK,
) -> Window:
    """Returns the examples of a window; the same ones however often it is read, while Kafka keeps its records.

    At any time it holds what is kept, one chunk of records, and of one partition its feedback and request ids, hashed.
    Raises BrokerUnavailable.
    """
    selection = Selection(
        max_fresh=training.max_examples,
        max_replay=training.replay_examples,
        half_life_ms=training.replay_half_life_s * 1000,
        seed=seed,
    )
    counts, done = JoinCounts(), 0
    # What is asked for is there already, so every wait inside the client is a wait for nothing.
    quick = {"fetch_max_wait_ms": 10, "retry_backoff_ms": 10}
    consumer = open_consumer(kafka, auto_offset_reset="earliest", max_poll_records=chunk, **quick)
    topics = tailrace_topics(kafka)

    def chunks(stream: str, partition: int) -> Iterator[Chunk]:
        nonlocal done
        begin, end = window.offsets[f"{stream}:{partition}"]
        place = TopicPartition(topics[stream].name, partition)
        for records, position in _poll(consumer, place, begin, end):
            yield decode_chunk(stream, records)
            if progress is not None:
                progress(f"{stream} {partition}", done + min(position, end) - begin, window.num_records)
        done += max(end - begin, 0)

    try:
        for partition in window.partitions:
            feedback = (one for stream in ("clicks", "ratings") for one in chunks(stream, partition))
            counts += read_partition(partition, feedback, chunks("impressions", partition), selection, window, training)
    except KafkaError as error:
        raise BrokerUnavailable(f"Kafka at {kafka.bootstrap_servers} failed: {error}") from error
    finally:
        consumer.close()
    return Window(selection.fresh, selection.replay, counts)


@dataclass
class Chunk:
    """Some records of one stream and partition, decoded."""

    clicks: list[Click | Rating] = field(default_factory=list)
    impressions: list[Impression] = field(default_factory=list)
    logged_ms: dict[RequestId, int] = field(default_factory=dict)  # of each impression's first record
    forgotten: dict[UserId, int] = field(default_factory=dict)
    undecodable: int = 0


def read_partition(
    partition: int,
    feedback: Iterable[Chunk],
    impressions: Iterable[Chunk],
    selection: Selection,
    window: LogWindow,
    training: TrainingSettings,
) -> JoinCounts:
    """Puts a partition's examples into `selection`, and returns what became of its records. Touches nothing else."""
    # 1. All feedback, as a small table, and who asked to be forgotten.
    undecodable, forgotten = 0, dict[UserId, int]()
    tables = [feedback_table([], training)]
    for chunk in feedback:
        tables.append(feedback_table(chunk.clicks, training))
        for user_id, at_ms in chunk.forgotten.items():
            forgotten[user_id] = max(at_ms, forgotten.get(user_id, 0))
        undecodable += chunk.undecodable
    joining = Joining(pd.concat(tables), forgotten, cutoff_ms=window.cutoff_ms, settings=training)
    # 2. Impressions, a chunk at a time; only those that may be kept become examples.
    already = window.already
    for chunk in impressions:
        undecodable += chunk.undecodable
        joining.forget(chunk.forgotten)
        for impression in joining.admit(chunk.impressions):
            request_id, at_ms = impression.request_id, impression.at_ms
            fresh = (
                already is None
                or at_ms >= already.learned_until_ms
                or chunk.logged_ms[request_id] > already.cutoff_ms - training.wait_s * 1000
            )
            if selection.wants(request_id, at_ms, fresh=fresh):
                example = joining.example(impression)
                if example is not None:
                    selection.offer(example, partition, fresh=fresh)
    # 3. Labels, for what is kept of it.
    selection.settle(partition, joining.finish())
    return joining.counts + JoinCounts(undecodable=undecodable)


def decode_chunk(stream: str, records: Sequence[Any]) -> Chunk:
    """Returns what kafka-python's records of a stream say. As for the stream workers, a key is the event's user."""
    chunk = Chunk()
    for record in records:
        try:
            key = (record.key or b"").decode()
            if record.value is None:
                user_id = UserId(key)
                chunk.forgotten[user_id] = max(record.timestamp, chunk.forgotten.get(user_id, 0))
                continue
            event = decode_event(stream, record.value)
            if key != event.user_id or event.at_ms < 0:
                raise InvalidRecord("not its user's, or before 1970", field="$.user_id")
        except (InvalidRecord, UnicodeDecodeError):
            chunk.undecodable += 1
            continue
        if isinstance(event, Impression):
            chunk.impressions.append(event)
            chunk.logged_ms.setdefault(event.request_id, record.timestamp)
        elif isinstance(event, Click | Rating):
            chunk.clicks.append(event)
    return chunk


def _poll(consumer: Any, place: TopicPartition, begin: int, end: int) -> Iterator[tuple[list[Any], int]]:
    """Yields the records from `begin` up to `end`, and the position after them. Raises BrokerUnavailable."""
    if begin >= end:
        return
    consumer.assign([place])
    consumer.seek(place, begin)
    position, moved_at = begin, time.monotonic()
    while position < end:
        records = consumer.poll(timeout_ms=500).get(place, [])
        now = time.monotonic()
        if consumer.position(place) > position:
            position, moved_at = consumer.position(place), now
            yield [record for record in records if record.offset < end], position
        elif now - moved_at > _PATIENCE_S:
            raise BrokerUnavailable(f"{place.topic}:{place.partition}: no record after {position} in {_PATIENCE_S:g} s")
