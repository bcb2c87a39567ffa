"""Puts records on Kafka for the gateway, off the event loop: acknowledged ones for producers, impressions besides.

One thread owns the way in. It connects when it can and says whether it has; nobody waits for the broker longer than
they chose to, and what may wait is bounded: records beyond the bound are refused at once.
"""

import threading
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import structlog
from kafka.errors import KafkaError, KafkaTimeoutError, MessageSizeTooLargeError

from tailrace.errors import BrokerUnavailable
from tailrace.kafka_clients import close_producer, open_producer
from tailrace.settings import KafkaSettings
from tailrace.topics import tailrace_topics

log = structlog.get_logger()


@dataclass(frozen=True)
class Outgoing:
    """A record to be produced: the role of its topic, its key, its value (None removes), its time (None: now)."""

    role: str
    key: str
    value: bytes | None
    timestamp_ms: int | None = None


class Delivery:
    """What became of some records. `outcomes[i]` is True once acknowledged, an error once refused, None until then."""

    def __init__(self, records: Sequence[Outgoing]) -> None:
        self.records = records
        self.outcomes: list[bool | Exception | None] = [None] * len(records)
        self.finished: Future[None] = Future()
        self.abandoned = False
        self.num_bytes = sum(len(record.value or b"") + 200 for record in records)
        self._left = len(records)
        self._lock = threading.Lock()

    def abandon(self) -> None:
        """Says that nobody waits any longer: what has not left by now must not leave later."""
        self.abandoned = True

    def settle(self, index: int, outcome: bool | Exception) -> bool:
        """Notes the outcome of one record and returns whether it was the last."""
        with self._lock:
            self.outcomes[index] = outcome
            self._left -= 1
            last = self._left == 0
        if last:
            self.finished.set_result(None)
        return last


class EventLog:
    """The gateway's producer. `append` returns at once; the broker's answer comes through the Delivery."""

    def __init__(
        self, kafka: KafkaSettings, *, delivery_timeout_s: float, max_pending_bytes: int = 64 * 1024 * 1024
    ) -> None:
        self._kafka = kafka
        self._topics = {role: topic.name for role, topic in tailrace_topics(kafka).items()}
        self._timeout_ms = max(int(delivery_timeout_s * 1000), 1000)
        self._max_pending_bytes = max_pending_bytes
        self._queue: deque[Delivery] = deque()
        self._change = threading.Condition()
        self._pending_bytes = 0
        self._connected = threading.Event()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="event-log", daemon=True)

    def start(self) -> "EventLog":
        """Starts connecting and returns at once."""
        self._thread.start()
        return self

    @property
    def connected(self) -> bool:
        """Whether the broker has answered since this process started."""
        return self._connected.is_set()

    def append(self, records: Sequence[Outgoing]) -> Delivery:
        """Hands the records over, in order, and returns their Delivery. Raises BrokerUnavailable when too many wait."""
        delivery = Delivery(records)
        with self._change:
            if self._pending_bytes + delivery.num_bytes > self._max_pending_bytes:
                raise BrokerUnavailable("too many records already wait for the broker")
            if not records:
                delivery.finished.set_result(None)
                return delivery
            self._pending_bytes += delivery.num_bytes
            self._queue.append(delivery)
            self._change.notify()
        return delivery

    def close(self, timeout_s: float = 5.0) -> None:
        """Sends what waits, as far as the broker takes it within `timeout_s`, and ends the thread."""
        self._stop.set()
        with self._change:
            self._change.notify()
        self._thread.join(timeout_s)

    def _run(self) -> None:
        producer = self._connect()
        while producer is not None:
            delivery = self._take()
            if delivery is None:
                close_producer(producer, timeout_s=self._timeout_ms / 1000)
                return
            if not self._send_all(producer, delivery):
                close_producer(producer, timeout_s=0)
                producer = self._connect()
        self._refuse_all()

    def _take(self) -> Delivery | None:
        """Returns the next delivery that someone still waits for, or None once stopped with nothing left."""
        while True:
            with self._change:
                while not self._queue and not self._stop.is_set():
                    self._change.wait()
                if not self._queue:
                    return None
                delivery = self._queue.popleft()
            if not delivery.abandoned:
                return delivery
            self._refuse(delivery, BrokerUnavailable("given up before it could be sent"))

    def _refuse_all(self) -> None:
        while self._queue:
            self._refuse(self._queue.popleft(), BrokerUnavailable("the gateway ends, and the broker never answered"))

    def _refuse(self, delivery: Delivery, error: Exception) -> None:
        for index in range(len(delivery.records)):
            self._settle(delivery, index, error)

    def _connect(self) -> Any:
        while not self._stop.is_set():
            try:
                producer = open_producer(
                    self._kafka,
                    max_block_ms=self._timeout_ms,
                    request_timeout_ms=self._timeout_ms,
                    delivery_timeout_ms=self._timeout_ms,
                    bootstrap_timeout_ms=1000,
                    reconnect_backoff_max_ms=1000,
                    metrics_enabled=False,
                )
                for role in ("clicks", "ratings", "contexts", "impressions"):
                    producer.partitions_for(self._topics[role])
            except (BrokerUnavailable, KafkaError) as error:
                log.warning("the event log has no broker yet", error=str(error))
                self._stop.wait(0.5)
                continue
            self._connected.set()
            return producer
        return None

    def _send_all(self, producer: Any, delivery: Delivery) -> bool:
        """Sends the records, in order, and returns whether the producer is still of use."""
        usable = True
        for index, record in enumerate(delivery.records):
            if delivery.abandoned:  # each send may wait for the broker
                self._settle(delivery, index, BrokerUnavailable("given up before it could be sent"))
                continue
            try:
                future = producer.send(
                    self._topics[record.role], record.value, record.key.encode(), timestamp_ms=record.timestamp_ms
                )
            except KafkaError as error:
                usable = usable and isinstance(error, KafkaTimeoutError | MessageSizeTooLargeError)
                self._settle(delivery, index, error)
                continue
            future.add_callback(lambda _, index=index: self._settle(delivery, index, True))
            future.add_errback(lambda error, index=index: self._settle(delivery, index, error))
        return usable

    def _settle(self, delivery: Delivery, index: int, outcome: bool | Exception) -> None:
        if delivery.settle(index, outcome):
            with self._change:
                self._pending_bytes -= delivery.num_bytes
