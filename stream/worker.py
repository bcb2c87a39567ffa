"""The stream worker: events in, profiles and counters saved with the offsets they reflect, in one write.

A worker owns whole partitions of the four user streams. `StreamWorker.step` is the page to read; its numbers are
those of the failure table in the README, and each row there has a test in tests/recovery. There is no Ray here: the
supervisor runs this class inside an actor, and `python -m stream.worker --settings FILE --partitions 0,1` in a process.
"""

import gc
import signal
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeVar

import click
import structlog
from kafka.errors import KafkaError

from stream.admission import Erasure, admit, dead_letter
from stream.cursor import Records, StreamCursor
from stream.item_topics import ItemTopicsTable
from stream.partition import OwnedPartition
from stream.progress import Progress, ProgressMeter
from stream.publishing import ItemStatsPublisher, publish_dead_letters
from tailrace.counters import CounterTable
from tailrace.errors import BrokerUnavailable, Fenced, InvalidRecord, StoreError
from tailrace.events import DeadLetter, UserEvent
from tailrace.fold import Stream
from tailrace.kafka_clients import close_producer, open_producer
from tailrace.settings import Settings, load_settings
from tailrace.stores import open_store
from tailrace.stores.store import Offset, Store
from tailrace.topics import tailrace_topics

log = structlog.get_logger()

STEPS = ("1 poll", "2 decode", "3 load", "4 fold", "5 dead letters", "6 save", "7 commit", "8 publish")
_ACK_TIMEOUT_S = 10.0
Client = TypeVar("Client")

_FIRST_BACKOFF_S, _LONGEST_BACKOFF_S = 0.1, 5.0


def _hear_nothing(step: str) -> None:
    pass


class StreamWorker:
    """Folds the events of some partitions into a store, until it is stopped or fenced out of all of them.

    `on_step` hears the name of each of `STEPS` as it ends: the recovery tests die there.
    """

    def __init__(
        self,
        settings: Settings,
        partitions: Sequence[int],
        store: Store,
        *,
        on_step: Callable[[str], None] = _hear_nothing,
    ) -> None:
        self._settings = settings
        self._on_step = on_step
        self._max_ahead_ms = settings.stream.max_ahead_s * 1000
        self._topics = tailrace_topics(settings.kafka)
        max_profiles = max(settings.stream.profile_cache // len(partitions), 1)
        self._partitions = {number: OwnedPartition(number, store, max_profiles) for number in partitions}
        self._unloaded = dict.fromkeys(partitions, 0.0)  # partition: when to load it from the store, monotonic s
        self._backoff_s = _FIRST_BACKOFF_S
        self._stop = threading.Event()
        self._meter = ProgressMeter()
        self._meter.partitions = tuple(partitions)
        self._catalogue = ItemTopicsTable(settings.kafka)
        # Set by `run`, which waits for the broker.
        self._cursor: StreamCursor
        self._producer: Any
        self._stats: ItemStatsPublisher

    def run(self) -> None:
        """Works until `stop` is called, or until other workers have claimed every partition. Raises TopicMismatch.

        A broker that is away, at the start or later, is waited for.
        """
        with ExitStack() as closing:
            self._open(closing)
            while not self._stop.is_set() and self._partitions:
                try:
                    self.step()
                except (KafkaError, BrokerUnavailable) as error:
                    self._wait_after(error)

    def stop(self) -> None:
        """Asks the worker to finish its batch, publish its counters and return from `run`. From any thread."""
        self._stop.set()

    def progress(self) -> Progress:
        """Returns how far the worker has come. From any thread."""
        return self._meter.read()

    def step(self) -> None:
        """Takes one batch of records from Kafka into the store. A crash between two steps loses and doubles nothing.

        1. Poll records of the owned partitions, going on from the offsets in the store.
        2. Decode them; one that cannot be used becomes a dead letter.
        3. Load the profiles the batch is about and the cache lacks: one read per partition.
        4. Fold the events into profiles and counters, in memory.
        5. Publish the dead letters, and wait until the broker has them.
        6. Save profiles, counters and offsets: one write per partition. This is the moment that counts.
        7. Commit the offsets to Kafka, for lag tools. Nobody waits, a failure is logged.
        8. Publish changed counters to `item-stats`, about once a second, in chunks. Nobody waits.
        """
        self._load_partitions()
        # 1. Poll.
        batches, moved = self._cursor.poll(self._poll_timeout_s())
        for number in moved & self._partitions.keys():
            self._reload(number, after_s=0.0)
        self._on_step(STEPS[0])
        for number, records in batches.items():
            if number in self._partitions and number not in self._unloaded:
                self._apply(self._partitions[number], records)
        # 7. Commit.
        self._cursor.commit()
        self._on_step(STEPS[6])
        # 8. Publish.
        self._publish_stats()
        self._on_step(STEPS[7])
        self._meter.sample()

    def _apply(self, partition: OwnedPartition, records: Records) -> None:
        try:
            # 2. Decode.
            events, letters = self._decode(partition, records)
            self._on_step(STEPS[1])
            # 3. Load.
            partition.load_profiles({event.user_id for of_stream in events.values() for event in of_stream})
            self._on_step(STEPS[2])
            # 4. Fold.
            items = self._catalogue.items
            repeated = sum(partition.fold(stream, of_stream, items) for stream, of_stream in events.items())
            self._on_step(STEPS[3])
            # 5. Publish dead letters.
            if letters:
                publish_dead_letters(self._producer, self._topics["dead-letters"].name, letters, _ACK_TIMEOUT_S)
            self._on_step(STEPS[4])
            # 6. Save.
            for stream, of_stream in records.items():
                topic_id = partition.offsets[stream].topic_id
                partition.offsets[stream] = Offset(topic_id, of_stream[-1].offset + 1)
            changed = partition.save()
            self._on_step(STEPS[5])
        except (StoreError, KafkaError) as error:
            self._throw_away(partition.number, error)
            return
        self._stats.note(partition.number, changed)
        self._cursor.note_saved(partition.number, partition.offsets)
        self._meter.note_saved(sum(map(len, events.values())), repeated, len(letters))
        self._meter.note_place(
            partition.number, partition.offsets, self._cursor.lag(partition.number, partition.offsets)
        )
        self._backoff_s = _FIRST_BACKOFF_S

    def _decode(
        self, partition: OwnedPartition, records: Records
    ) -> tuple[Mapping[Stream, list[UserEvent | Erasure]], list[DeadLetter]]:
        events: dict[Stream, list[UserEvent | Erasure]] = {}
        letters: list[DeadLetter] = []
        for stream, of_stream in records.items():
            admitted = events[stream] = []
            known = partition.offsets[stream].next_offset
            for record in of_stream:
                if record.offset < known:
                    continue  # at or below the stored offset: folded already
                try:
                    admitted.append(admit(stream, record, self._max_ahead_ms))
                except InvalidRecord as error:
                    letters.append(dead_letter(record, error))
        return events, letters

    def _poll_timeout_s(self) -> float:
        if self._stats.waiting:
            return 0.0
        return min(self._settings.stream.poll_timeout_s, self._settings.stream.stats_interval_s)

    def _publish_stats(self) -> None:
        self._check_claims(self._stats.partitions_due(time.monotonic()))
        self._meter.stats_published += self._stats.publish(self._tables())

    def _check_claims(self, numbers: Iterable[int]) -> None:
        # A claim that was lost while we slept must not overwrite the new owner's counters: ask before sending.
        for number in numbers:
            try:
                self._partitions[number].check_claim()
            except StoreError as error:
                self._throw_away(number, error)

    # When something fails.

    def _throw_away(self, number: int, error: Exception) -> None:
        """Forgets what is in memory of a partition: to be loaded again later, or never, where the claim is lost."""
        self._note(error)
        self._meter.thrown_away += 1
        if isinstance(error, Fenced):
            self._cursor.hold(number)
            self._stats.forget(number)
            self._meter.forget(number)
            del self._partitions[number]
            self._unloaded.pop(number, None)
            self._meter.partitions = tuple(self._partitions)
            self._meter.fenced += (number,)
            return
        self._reload(number, after_s=self._backoff_s)
        self._backoff_s = min(self._backoff_s * 2, _LONGEST_BACKOFF_S)

    def _reload(self, number: int, *, after_s: float) -> None:
        self._cursor.hold(number)
        self._stats.forget(number)
        self._unloaded[number] = time.monotonic() + after_s

    def _load_partitions(self) -> None:
        """Claims or reloads every partition whose time has come, and seeks to its offsets."""
        for number in [number for number, at_s in self._unloaded.items() if at_s <= time.monotonic()]:
            partition = self._partitions[number]
            try:
                partition.load()
                partition.offsets = self._cursor.place(number, partition.offsets)
            except (StoreError, KafkaError) as error:
                self._throw_away(number, error)
                continue
            del self._unloaded[number]
            self._cursor.note_saved(number, partition.offsets)
            self._meter.note_place(number, partition.offsets, self._cursor.lag(number, partition.offsets))
            # Whoever owned the partition may have died before publishing: publish all of it once.
            self._stats.note(number, partition.counters.items)
            log.info("partition loaded", partition=number, items=len(partition.counters.items))
        self._meter.skipped_records = self._cursor.skipped_records
        self._meter.recreated_topics = self._cursor.recreated_topics
        self._meter.ready = not self._unloaded

    def _wait_after(self, error: Exception) -> None:
        self._note(error)
        self._stop.wait(self._backoff_s)
        self._backoff_s = min(self._backoff_s * 2, _LONGEST_BACKOFF_S)

    def _note(self, error: Exception) -> None:
        self._meter.last_error = f"{type(error).__name__}: {error}"
        log.warning("stream worker cannot go on yet", error=self._meter.last_error)

    # Beginning and end.

    def _open(self, closing: ExitStack) -> None:
        """Opens what the steps need, however long the broker takes, and notes how to close it; less, when stopped."""
        self._catalogue.start()
        closing.callback(self._catalogue.stop)
        producer = self._connect(lambda: open_producer(self._settings.kafka, linger_ms=2, max_block_ms=5000))
        if producer is None:
            return
        closing.callback(close_producer, producer, timeout_s=5)
        self._producer = producer
        cursor = self._connect(lambda: StreamCursor(self._settings, tuple(self._partitions)))
        if cursor is None:
            return
        closing.callback(cursor.close)
        self._cursor = cursor
        topic, interval_s = self._topics["item-stats"].name, self._settings.stream.stats_interval_s
        self._stats = ItemStatsPublisher(producer, topic, interval_s)
        closing.callback(self._publish_the_rest)
        while not self._stop.is_set() and not self._catalogue.caught_up:
            self._stop.wait(0.02)

    def _connect(self, connect: Callable[[], Client]) -> Client | None:
        """Returns what `connect` opens, trying again until it does; None where the worker is stopped before."""
        while not self._stop.is_set():
            try:
                return connect()
            except (KafkaError, BrokerUnavailable) as error:
                self._wait_after(error)
        return None

    def _publish_the_rest(self) -> None:
        self._check_claims(self._partitions.keys() - self._unloaded.keys())
        try:
            self._stats.drain(self._tables(), _ACK_TIMEOUT_S)
        except KafkaError as error:
            log.warning("item counters not published; the next owner will", error=str(error))

    def _tables(self) -> dict[int, CounterTable]:
        return {number: partition.counters for number, partition in self._partitions.items()}


def relax_garbage_collection() -> None:
    """Lets this process collect cycles rarely: a worker holds many long-lived objects, and makes no cycles of them."""
    gc.set_threshold(100_000, 50, 100)


@click.command()
@click.option("--settings", "file", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="TOML file.")
@click.option("--partitions", required=True, help="The partitions to own, such as 0,1,2.")
def main(file: Path | None, partitions: str) -> None:
    """Runs one stream worker in this process, without Ray, until it is interrupted or terminated."""
    relax_garbage_collection()
    settings = load_settings(file)
    store = open_store(settings)
    worker = StreamWorker(settings, [int(number) for number in partitions.split(",")], store)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: worker.stop())
    try:
        worker.run()
    finally:
        store.close()


if __name__ == "__main__":
    main()
