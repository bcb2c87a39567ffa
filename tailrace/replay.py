"""Sends a data set to Kafka: `import` as fast as the broker takes it, `replay` at the pace of its own times.

An event's own time stands in its JSON. The Kafka record's time is left to be the moment of sending: topics keep records
for so many days after that time, so a record stamped 2016 would be deleted within minutes of being sent.

The log is read first and events whose id it holds are passed over, so sending again sends nothing twice and an
interrupted import goes on where it stopped. (The stream's own window of repeated ids is 64 per user and stream: it
catches a producer's retries, not a second import.) Items are always sent: the newest value of a key is all that counts.
"""

import heapq
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from math import inf, isinf
from typing import Any

import msgspec
from kafka import TopicPartition
from kafka.errors import KafkaError, KafkaTimeoutError

from tailrace.errors import BrokerUnavailable, TailraceError
from tailrace.events import encode
from tailrace.importers.source import Dataset, Row
from tailrace.items import Item
from tailrace.kafka_clients import close_producer, create_topics, open_consumer, open_producer
from tailrace.settings import KafkaSettings
from tailrace.topics import USER_STREAMS, tailrace_topics

STALL_S = 20.0
MAX_IN_FLIGHT = 50_000
_LONGEST_NAP_S = 0.2  # so that progress is shown while nothing is due


@dataclass
class SendReport:
    """What became of a data set. `acknowledged` is what the broker has said it holds."""

    items: int = 0
    events: int = 0
    present: int = 0
    acknowledged: int = 0
    seconds: float = 0.0
    behind_s: float = 0.0
    interrupted: bool = False

    @property
    def sent(self) -> int:
        """Records handed to the producer."""
        return self.items + self.events


OnProgress = Callable[[SendReport, Row | None], None]


class Pace:
    """When each event of a replay is due: real gaps divided by `speed`, counted from the first event.

    Pure but for `clock`, which gives seconds from anywhere.
    """

    def __init__(self, first_ms: int, speed: float, clock: Callable[[], float] = time.monotonic) -> None:
        if not speed > 0:
            raise ValueError(f"speed {speed} must be above 0")
        self._first_ms = first_ms
        self._speed = speed
        self._clock = clock
        self._start_s = clock()

    def due_s(self, at_ms: int) -> float:
        """Returns how many seconds after the start an event of `at_ms` is due. What came before the first: at once."""
        if isinf(self._speed):
            return 0.0
        return max((at_ms - self._first_ms) / 1000.0 / self._speed, 0.0)

    def wait_s(self, at_ms: int) -> float:
        """Returns how long to wait from now; below 0: how late it is already. At `max` speed nothing is ever late."""
        if isinf(self._speed):
            return 0.0
        return self.due_s(at_ms) - (self._clock() - self._start_s)


def in_event_time(dataset: Dataset) -> Iterator[Row]:
    """Yields items and events by their own times; an item comes before an event of the same moment."""
    return heapq.merge(dataset.items, dataset.events, key=lambda row: row.at_ms)


def send_import(
    kafka: KafkaSettings, dataset: Dataset, *, resend: bool, limit: int | None, on_progress: OnProgress
) -> SendReport:
    """Sends items, waits until the broker has them, then sends events. Returns what became of them.

    Raises BrokerUnavailable, TopicMismatch. A KeyboardInterrupt ends the sending, not the report.
    """
    present = _prepare(kafka, resend)
    with _Sender(kafka, present, on_progress, linger_ms=20) as sender:
        sender.send(dataset.items)
        sender.flush()
        sender.send(_first(dataset.events, limit))
    return sender.report


def send_replay(
    kafka: KafkaSettings, dataset: Dataset, *, speed: float, resend: bool, limit: int | None, on_progress: OnProgress
) -> SendReport:
    """Sends items and events in the order of their times, `speed` times as fast as they happened. As `send_import`."""
    present = _prepare(kafka, resend)
    with _Sender(kafka, present, on_progress, linger_ms=20 if isinf(speed) else 2) as sender:
        sender.send(_first(in_event_time(dataset), limit), speed)
    return sender.report


def _prepare(kafka: KafkaSettings, resend: bool) -> set[int]:
    create_topics(kafka)
    return set() if resend else load_present_ids(kafka)


def _first(rows: Iterable[Row], limit: int | None) -> Iterator[Row]:
    """Yields rows until `limit` events have gone by; items do not count."""
    events = 0
    for row in rows:
        events += row.role != "items"
        if limit is not None and events > limit:
            return
        yield row


class _EventId(msgspec.Struct):
    event_id: str


def load_present_ids(kafka: KafkaSettings) -> set[int]:
    """Returns the hashes (of this process) of every event id in the log. Reads about 100,000 records a second.

    Raises BrokerUnavailable.
    """
    decoder = msgspec.json.Decoder(_EventId)
    topics = tailrace_topics(kafka)
    consumer = open_consumer(kafka, max_poll_records=5000)
    found: set[int] = set()
    try:
        partitions = [
            TopicPartition(topics[role].name, index) for role in USER_STREAMS for index in range(kafka.user_partitions)
        ]
        consumer.assign(partitions)
        ends = consumer.end_offsets(partitions)
        consumer.seek_to_beginning(*partitions)
        while any(consumer.position(partition) < end for partition, end in ends.items()):
            for records in consumer.poll(timeout_ms=500).values():
                for record in records:
                    if record.value is not None:
                        found |= _hash_of_id(decoder, record.value)
    except KafkaError as error:
        raise BrokerUnavailable(f"Kafka at {kafka.bootstrap_servers} failed: {error}") from error
    finally:
        consumer.close()
    return found


def _hash_of_id(decoder: msgspec.json.Decoder[_EventId], value: bytes) -> set[int]:
    try:
        return {hash(decoder.decode(value).event_id)}
    except msgspec.MsgspecError:  # another producer's bad record; the workers will report it
        return set()


class _Sender:
    """A producer that counts what is acknowledged and stops at the first record that is not."""

    def __init__(self, kafka: KafkaSettings, present: set[int], on_progress: OnProgress, *, linger_ms: int) -> None:
        self.report = SendReport()
        self._kafka = kafka
        self._topics = {role: topic.name for role, topic in tailrace_topics(kafka).items()}
        self._present = present
        self._on_progress = on_progress
        self._lock = threading.Lock()
        self._failed: list[BaseException] = []
        self._producer: Any = open_producer(kafka, linger_ms=linger_ms, batch_size=262_144, delivery_timeout_ms=45_000)
        try:
            for role in ("items", *USER_STREAMS):
                self._producer.partitions_for(self._topics[role])  # learnt now, so that the first record is not late
        except KafkaError as error:
            close_producer(self._producer, timeout_s=0)
            raise self._stopped(error) from error
        self._begun = time.monotonic()

    def __enter__(self) -> "_Sender":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> bool:
        try:
            if kind is None or kind is KeyboardInterrupt:
                self.report.interrupted = kind is not None
                self.flush()
        finally:
            close_producer(self._producer, timeout_s=1)
            self.report.seconds = time.monotonic() - self._begun
        return kind is KeyboardInterrupt

    def send(self, rows: Iterable[Row], speed: float = inf) -> None:
        """Hands every row to the producer when it is due. Raises BrokerUnavailable when one was not acknowledged."""
        report, pace = self.report, None
        for row in rows:
            if not isinstance(row.record, Item) and hash(row.record.event_id) in self._present:
                report.present += 1
                self._on_progress(report, row)
                continue
            if pace is None and row.role != "items":
                pace = Pace(row.at_ms, speed)  # time runs from the first event that is really sent
            if pace is not None:
                self._wait(pace, row)
            self._check()
            if report.sent - report.acknowledged >= MAX_IN_FLIGHT:
                self.flush()  # kafka-python's producer puts no bound on what it buffers
            try:
                sent = self._producer.send(self._topics[row.role], key=row.key.encode(), value=encode(row.record))
            except KafkaError as error:
                raise self._stopped(error) from error
            sent.add_callback(self._acknowledge)
            sent.add_errback(self._failed.append)
            if row.role == "items":
                report.items += 1
            else:
                report.events += 1
            self._on_progress(report, row)

    def flush(self) -> None:
        """Returns once the broker has everything. Raises BrokerUnavailable when it has taken nothing for 20 s."""
        taken, deadline = -1, 0.0
        while self.report.acknowledged < self.report.sent:
            if self.report.acknowledged > taken:
                taken, deadline = self.report.acknowledged, time.monotonic() + STALL_S
            try:
                self._producer.flush(timeout=_LONGEST_NAP_S)
            except KafkaTimeoutError as error:
                if time.monotonic() > deadline:
                    raise self._stopped(error) from error
            except KafkaError as error:
                raise self._stopped(error) from error
            self._on_progress(self.report, None)
            self._check()

    def _wait(self, pace: Pace, row: Row) -> None:
        while (wait_s := pace.wait_s(row.at_ms)) > 0:
            self._on_progress(self.report, None)
            time.sleep(min(wait_s, _LONGEST_NAP_S))
        self.report.behind_s = max(self.report.behind_s, -wait_s)

    def _acknowledge(self, _: object) -> None:
        with self._lock:  # called by the producer's thread, or by ours when the answer was faster
            self.report.acknowledged += 1

    def _check(self) -> None:
        if self._failed:
            raise self._stopped(self._failed[0])

    def _stopped(self, error: BaseException) -> TailraceError:
        return BrokerUnavailable(
            f"Kafka at {self._kafka.bootstrap_servers} stopped taking records after {self.report.acknowledged} "
            f"acknowledged ({error or type(error).__name__}); the same command again goes on from there"
        )
