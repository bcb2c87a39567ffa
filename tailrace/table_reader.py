"""Reads a compacted topic whole, then follows it: how a process keeps a table of items, counters or models."""

import threading
from collections.abc import Callable

import structlog
from kafka import TopicPartition
from kafka.errors import KafkaError

from tailrace.errors import BrokerUnavailable, InvalidRecord, NotReady
from tailrace.kafka_clients import open_consumer
from tailrace.settings import KafkaSettings
from tailrace.topics import tailrace_topics

log = structlog.get_logger()

# Receives key, value (None: removed) and the record's time in epoch ms, in the thread that reads.
ApplyRecord = Callable[[str, bytes | None, int], None]


class TableReader:
    """A thread that applies every record of one compacted topic, in order, and says when it has caught up.

    A record `apply` refuses with InvalidRecord is counted in `rejected`, logged and passed over. A broker that
    goes away is waited for: the table stays as it was.
    """

    def __init__(self, kafka: KafkaSettings, role: str, apply: ApplyRecord) -> None:
        self.role = role
        self.rejected = 0
        self._kafka = kafka
        self._topic = tailrace_topics(kafka)[role]
        self._apply = apply
        self._caught_up = threading.Event()
        self._stop = threading.Event()
        self._positions: dict[int, int] = {}
        self._thread = threading.Thread(target=self._run, name=f"table-{role}", daemon=True)

    def start(self) -> "TableReader":
        """Starts reading and returns at once."""
        self._thread.start()
        return self

    def wait(self, timeout_s: float) -> None:
        """Returns once everything that stood in the topic at the start has been applied. Raises NotReady."""
        if not self._caught_up.wait(timeout_s):
            raise NotReady(f"table {self.role} was not read within {timeout_s:g} s")

    @property
    def caught_up(self) -> bool:
        """Whether everything that stood in the topic at the start has been applied."""
        return self._caught_up.is_set()

    def stop(self) -> None:
        """Stops the thread and waits for it."""
        self._stop.set()
        self._thread.join(timeout=10)

    def _run(self) -> None:
        while not self._stop.is_set():
            try:
                self._follow()
            except (KafkaError, BrokerUnavailable) as error:
                log.warning("table reader lost the broker", role=self.role, error=str(error))
                self._stop.wait(0.5)

    def _follow(self) -> None:
        # 1. Own every partition, from the first record not yet applied.
        #    Where the topic has been created anew since, that is its start.
        consumer = open_consumer(self._kafka, fetch_max_wait_ms=100, auto_offset_reset="earliest")
        try:
            partitions = [TopicPartition(self._topic.name, index) for index in range(self._topic.partitions)]
            consumer.assign(partitions)
            for partition in partitions:
                if partition.partition in self._positions:
                    consumer.seek(partition, self._positions[partition.partition])
                else:
                    consumer.seek_to_beginning(partition)
            ends = consumer.end_offsets(partitions)
            # 2. Apply, note how far, and say when what stood there at the start is in.
            while not self._stop.is_set():
                for partition, records in consumer.poll(timeout_ms=100).items():
                    for record in records:
                        self._apply_record(record.key, record.value, record.timestamp, record.offset)
                    self._positions[partition.partition] = records[-1].offset + 1
                if not self._caught_up.is_set() and all(
                    consumer.position(partition) >= end for partition, end in ends.items()
                ):
                    self._caught_up.set()
        finally:
            consumer.close()

    def _apply_record(self, key: bytes | None, value: bytes | None, at_ms: int, offset: int) -> None:
        try:
            if key is None:
                raise InvalidRecord("a compacted record needs a key", field="key")
            self._apply(key.decode(), value, at_ms)
        except (InvalidRecord, UnicodeDecodeError) as error:
            self.rejected += 1
            log.warning("table record refused", role=self.role, offset=offset, error=str(error))
