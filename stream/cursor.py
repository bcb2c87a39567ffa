"""Where a worker reads: the consumer of its partitions of the four user streams, placed at the offsets of the store.

Knows Kafka and offsets; knows nothing of profiles. Owned by one thread, as every kafka-python consumer is.
"""

import time
from collections.abc import Mapping, Sequence
from typing import Any

import structlog
from kafka import TopicPartition
from kafka.errors import KafkaError, LogTruncationError, OffsetOutOfRangeError
from kafka.structs import OffsetAndMetadata

from tailrace.fold import STREAMS, Stream
from tailrace.kafka_clients import create_topics, open_consumer
from tailrace.settings import KafkaSettings, Settings
from tailrace.stores.store import Offset
from tailrace.topics import tailrace_topics

log = structlog.get_logger()

Records = dict[Stream, Sequence[Any]]  # of one partition: ConsumerRecords by stream, each in offset order

_COMMIT_INTERVAL_S = 0.5
_LOOK_INTERVAL_S = 1.0
_ANSWER_TIMEOUT_MS = 5000
# A partition whose fetched records were only partly taken sits out the fetch in flight (kafka-python leaves it out
# of the request), so an idle fetch must come back soon.
_FETCH_MAX_WAIT_MS = 50


class StreamCursor:
    """Reads the worker's partitions; each starts held, until `place` has put it at its stored offsets."""

    def __init__(self, settings: Settings, partitions: Sequence[int]) -> None:
        self._kafka = settings.kafka
        topics = tailrace_topics(settings.kafka)
        self._name_of: dict[Stream, str] = {stream: topics[stream].name for stream in STREAMS}
        self._stream_of: dict[str, Stream] = {name: stream for stream, name in self._name_of.items()}
        self._places = {n: [TopicPartition(self._name_of[s], n) for s in STREAMS] for n in partitions}
        self._topic_ids = _ids_of_streams(settings.kafka)
        self.skipped_records = 0
        self.recreated_topics = 0
        self._unreachable: dict[TopicPartition, int | None] = {}  # where Kafka refused to read, and where to go instead
        self._uncommitted: dict[TopicPartition, OffsetAndMetadata] = {}
        self._next_commit_at = 0.0
        self._next_look_at = 0.0
        self._consumer = open_consumer(
            settings.kafka,
            group_id=settings.stream.group,
            auto_offset_reset="none",
            max_poll_records=settings.stream.max_batch,
            fetch_min_bytes=1,
            fetch_max_wait_ms=_FETCH_MAX_WAIT_MS,
            retry_backoff_ms=20,
            metadata_max_age_ms=30_000,
        )
        self._ends = {place: 0 for of_partition in self._places.values() for place in of_partition}
        self._reading: set[int] = set()

    def place(self, partition: int, stored: Mapping[str, Offset]) -> dict[str, Offset]:
        """Returns the offsets the partition goes on from, having sought to them. Raises KafkaError.

        Where nothing is stored that is the start of the log. So it is, loudly, where the topic has been created
        anew, and where retention has passed what is stored: those records are counted as skipped.
        """
        places = self._places[partition]
        starts = self._consumer.beginning_offsets(places, timeout_ms=_ANSWER_TIMEOUT_MS)
        self._ends |= self._consumer.end_offsets(places, timeout_ms=_ANSWER_TIMEOUT_MS)
        offsets: dict[str, Offset] = {}
        for stream, place in zip(STREAMS, places, strict=True):
            offsets[stream] = Offset(self._topic_ids[stream], self._start(stream, place, stored, starts[place]))
        self._reading.add(partition)
        self._assign()
        for stream, place in zip(STREAMS, places, strict=True):
            self._consumer.seek(place, offsets[stream].next_offset)
        return offsets

    def _start(self, stream: Stream, place: TopicPartition, stored: Mapping[str, Offset], first: int) -> int:
        held = stored.get(stream)
        where = {"topic": place.topic, "partition": place.partition}
        refused, instead = place in self._unreachable, self._unreachable.pop(place, None)
        if held is None:
            return first
        if held.topic_id != self._topic_ids[stream]:
            self.recreated_topics += 1
            log.error("topic was created anew; reading it from its start", **where, stored=held.next_offset)
            return first
        if held.next_offset < first:
            self.skipped_records += first - held.next_offset
            log.error("retention passed the stored offset", **where, stored=held.next_offset, earliest=first)
            return first
        if refused:
            start = min(self._ends[place] if instead is None else instead, held.next_offset)
            log.error("the log is shorter than what was read of it", **where, stored=held.next_offset, now=start)
            return start
        return held.next_offset

    def hold(self, partition: int) -> None:
        """Reads and commits nothing more of the partition, until it is placed again: it may be another worker's."""
        self._reading.discard(partition)
        for place in self._places[partition]:
            self._uncommitted.pop(place, None)
        self._assign()

    def _assign(self) -> None:
        # Not pause and resume: kafka-python 3.0.12 may keep what it had fetched of a paused partition aside for ever.
        # What is no longer assigned it drops, and what stays assigned keeps its position.
        if self._reading:
            self._consumer.assign([place for number in sorted(self._reading) for place in self._places[number]])

    def poll(self, timeout_s: float) -> tuple[dict[int, Records], set[int]]:
        """Returns records by partition, and the partitions that must be placed again. Raises KafkaError."""
        moved = self._look_for_new_topics()
        try:
            polled = self._consumer.poll(timeout_ms=int(timeout_s * 1000))
        except (OffsetOutOfRangeError, LogTruncationError) as error:
            log.warning("Kafka refuses to read on from here", error=f"{type(error).__name__}: {error}")
            refused = _refused_places(error)
            self._unreachable |= refused
            self._topic_ids = _ids_of_streams(self._kafka)  # more often than not, it is another topic by now
            return {}, moved | {place.partition for place in refused}
        batches: dict[int, Records] = {}
        for place, records in polled.items():
            batches.setdefault(place.partition, {})[self._stream_of[place.topic]] = records
        return batches, moved

    def _look_for_new_topics(self) -> set[int]:
        now_s = time.monotonic()
        if now_s < self._next_look_at:
            return set()
        self._next_look_at = now_s + _LOOK_INTERVAL_S
        # The ids of the consumer's own metadata: kafka-python shows them nowhere else, and asking the broker blocks.
        cluster = self._consumer._cluster
        found = {stream: cluster.topic_id(name) for stream, name in self._name_of.items()}
        changed = {s: str(i) for s, i in found.items() if i is not None and str(i) != self._topic_ids[s]}
        self._topic_ids |= changed
        return set(self._places) if changed else set()

    def lag(self, partition: int, offsets: Mapping[str, Offset]) -> int:
        """Returns how many records of the partition stand in Kafka beyond `offsets`, as far as is known."""
        lag = 0
        for stream, place in zip(STREAMS, self._places[partition], strict=True):
            if partition in self._reading:
                self._ends[place] = max(self._consumer.highwater(place) or 0, self._ends[place])
            end = self._ends[place]
            lag += max(end - offsets[stream].next_offset, 0) if stream in offsets else end
        return lag

    def note_saved(self, partition: int, offsets: Mapping[str, Offset]) -> None:
        """Notes what may be committed."""
        for stream, place in zip(STREAMS, self._places[partition], strict=True):
            self._uncommitted[place] = OffsetAndMetadata(offsets[stream].next_offset, "", -1)

    def commit(self) -> None:
        """Sends the saved offsets to Kafka, at most twice a second, and does not wait."""
        now_s = time.monotonic()
        if self._uncommitted and now_s >= self._next_commit_at:
            self._next_commit_at = now_s + _COMMIT_INTERVAL_S
            self._consumer.commit_async(self._uncommitted, callback=self._note_commit)
            self._uncommitted = {}

    def _note_commit(self, offsets: dict[TopicPartition, OffsetAndMetadata], response: object) -> None:
        if isinstance(response, Exception):
            log.warning("offsets not committed yet; the store has them", error=str(response))
            ours = {place: offset for place, offset in offsets.items() if place.partition in self._reading}
            self._uncommitted = ours | self._uncommitted

    def close(self) -> None:
        """Commits what was saved, briefly waiting, and closes the consumer."""
        try:
            if self._uncommitted:
                self._consumer.commit(self._uncommitted, timeout_ms=2000)
        except KafkaError as error:
            log.warning("offsets not committed; the store has them", error=str(error))
        self._consumer.close(autocommit=False, timeout_ms=2000)


def _ids_of_streams(kafka: KafkaSettings) -> dict[Stream, str]:
    ids = create_topics(kafka)
    return {stream: ids[stream] for stream in STREAMS}


def _refused_places(error: OffsetOutOfRangeError | LogTruncationError) -> dict[TopicPartition, int | None]:
    """Returns where Kafka refused to read, and, where it says so, up to which offset the log is still the same."""
    if isinstance(error, OffsetOutOfRangeError):
        return dict.fromkeys(error.args[0])
    return {place: found and found.offset for place, found in error.divergent_offsets.items()}
