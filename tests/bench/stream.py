"""Events per second through one stream worker with LMDB, beside what kafka-python alone can read of the same topic.

One process, one thread of work: the figure is per core. The store fsyncs every save, as it does by default.
"""

import tempfile
import threading
import time
from pathlib import Path

import numpy as np
from kafka import TopicPartition
from rich.console import Console

from stream.broker import LocalKafka
from stream.worker import StreamWorker, relax_garbage_collection
from tailrace.events import Click, encode
from tailrace.ids import EventId, ItemId, UserId
from tailrace.kafka_clients import create_topics, open_consumer, open_producer
from tailrace.settings import Settings, load_settings
from tailrace.stores import open_store
from tailrace.topics import tailrace_topics
from tests.bench.report import Row

_EVENTS = 200_000
_USERS = 20_000
_ITEMS = 2_000
_ROUNDS = 3


def bench_stream(console: Console) -> list[Row]:
    """Returns the median events per second of the worker and of bare consumption, in turn on the same log."""
    with tempfile.TemporaryDirectory(prefix="tailrace-bench-") as folder:
        broker = LocalKafka.start(Path(folder) / "kafka")
        try:
            kafka = {"bootstrap_servers": broker.bootstrap_servers}
            settings = load_settings(None, data_dir=folder, kafka=kafka)
            create_topics(settings.kafka)
            size = _produce(settings)
            console.print(f"{_EVENTS:,} clicks of {size} bytes are on the topic")
            bare, folded = [], []
            for number in range(_ROUNDS):
                bare.append(_consume(settings))
                folded.append(_fold(settings, Path(folder) / f"store-{number}"))
                console.print(f"round {number}: bare {bare[-1]:,.0f}/s, through the worker {folded[-1]:,.0f}/s")
        finally:
            broker.stop()
    return [
        {"name": "events through one stream worker with LMDB", "value": float(np.median(folded)), "unit": "/s"},
        {"name": "the same records read by kafka-python alone", "value": float(np.median(bare)), "unit": "/s"},
    ]


def _produce(settings: Settings) -> int:
    rng = np.random.default_rng(0)
    users, items = rng.zipf(1.3, _EVENTS) % _USERS, rng.zipf(1.3, _EVENTS) % _ITEMS
    topic = tailrace_topics(settings.kafka)["clicks"].name
    producer = open_producer(settings.kafka, linger_ms=20, batch_size=262_144)
    now_ms = int(time.time() * 1000)
    size = 0
    for number in range(_EVENTS):
        user_id = UserId(f"user-{users[number]:07d}")
        click = Click(
            event_id=EventId(f"event-{number:010d}"),
            user_id=user_id,
            item_id=ItemId(f"item-{items[number]:06d}"),
            occurred_at=now_ms - _EVENTS + number,
            action="click",
            dwell_s=12.5,
        )
        value = encode(click)
        size = len(value)
        producer.send(topic, key=user_id.encode(), value=value)
    producer.flush(timeout=120)
    producer.close()
    return size


def _consume(settings: Settings) -> float:
    topic = tailrace_topics(settings.kafka)["clicks"]
    consumer = open_consumer(settings.kafka, max_poll_records=5000)
    partitions = [TopicPartition(topic.name, number) for number in range(topic.partitions)]
    consumer.assign(partitions)
    consumer.seek_to_beginning(*partitions)
    read, started = 0, time.perf_counter()
    while read < _EVENTS:
        read += sum(len(records) for records in consumer.poll(timeout_ms=500).values())
    taken = time.perf_counter() - started
    consumer.close()
    return read / taken


def _fold(settings: Settings, folder: Path) -> float:
    fresh = load_settings(
        None,
        data_dir=settings.data_dir,
        kafka={"bootstrap_servers": settings.kafka.bootstrap_servers},
        store={"path": str(folder)},
    )
    relax_garbage_collection()  # as every worker process does
    store = open_store(fresh)
    worker = StreamWorker(fresh, range(fresh.kafka.user_partitions), store)
    thread = threading.Thread(target=worker.run)
    thread.start()
    while worker.progress().events == 0:
        time.sleep(0.001)
    started, first = time.perf_counter(), worker.progress().events
    while worker.progress().events < _EVENTS:
        time.sleep(0.005)
    rate = (_EVENTS - first) / (time.perf_counter() - started)
    worker.stop()
    thread.join()
    store.close()
    return rate
