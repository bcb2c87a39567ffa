"""The scene of a recovery test: topics and a store of its own, real worker processes, and waiting with a deadline."""

import signal
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from kafka import TopicPartition

from tailrace.errors import StoreError
from tailrace.kafka_clients import create_topics, open_consumer
from tailrace.settings import Settings, load_settings
from tailrace.stores import open_store
from tailrace.stores.store import Store
from tailrace.topics import USER_STREAMS, tailrace_topics
from tests.recovery.launcher import Launcher, WorkerProcess
from tests.recovery.traffic import announce_items


def wait_until(condition: Callable[[], bool], what: str, timeout_s: float = 30.0) -> float:
    """Returns the seconds it took `condition` to hold. Raises AssertionError naming `what` after `timeout_s`."""
    began = time.monotonic()
    while not condition():
        if time.monotonic() - began > timeout_s:
            raise AssertionError(f"not within {timeout_s:g} s: {what}")
        time.sleep(0.01)
    return time.monotonic() - began


class Scene:
    """Topics and a store nobody else uses, and the workers started on them."""

    def __init__(
        self,
        folder: Path,
        bootstrap_servers: str,
        launcher: Launcher,
        *,
        partitions: int = 2,
        store: dict[str, Any] | None = None,
        create: bool = True,
        **stream: Any,
    ) -> None:
        self.folder = folder
        self._launcher = launcher
        sections: dict[str, dict[str, Any]] = {
            "kafka": {
                "bootstrap_servers": bootstrap_servers,
                "topic_prefix": f"t{uuid.uuid4().hex[:8]}-",
                "user_partitions": partitions,
                "item_partitions": 2,
            },
            "store": {"map_size_mb": 64} | (store or {}),
            "stream": {"max_batch": 200, "poll_timeout_s": 0.1, "stats_interval_s": 0.2} | stream,
        }
        self.file = folder / "tailrace.toml"
        self.file.write_text(_toml({"data_dir": str(folder / "data")}, sections))
        self.settings: Settings = load_settings(self.file, {})
        self.workers: list[WorkerProcess] = []
        self._store: Store | None = None
        if create:
            create_topics(self.settings.kafka)
            announce_items(self.settings)

    @property
    def store(self) -> Store:
        """The store, as a reader in this process sees it."""
        if self._store is None:
            self._store = open_store(self.settings)
        return self._store

    def start_worker(self, partitions: Sequence[int] | None = None, **options: str | int | None) -> WorkerProcess:
        """Returns a worker process of the given partitions (all), which dies where it is told to."""
        owned = list(range(self.settings.kafka.user_partitions) if partitions is None else partitions)
        log = self.folder / f"worker-{len(self.workers):03d}.log"
        self.workers.append(self._launcher.start(self.file, owned, log, **options))
        return self.workers[-1]

    def ends(self) -> dict[int, dict[str, int]]:
        """Returns the end of the log by partition and stream."""
        topics = tailrace_topics(self.settings.kafka)
        numbers = range(self.settings.kafka.user_partitions)
        places = {TopicPartition(topics[s].name, number): (number, s) for s in USER_STREAMS for number in numbers}
        consumer = open_consumer(self.settings.kafka)
        try:
            found: dict[int, dict[str, int]] = {number: {} for number in numbers}
            for place, end in consumer.end_offsets(list(places)).items():
                number, stream = places[place]
                found[number][stream] = end
            return found
        finally:
            consumer.close()

    def offsets(self, partition: int) -> dict[str, int]:
        """Returns the partition's offsets as the store has them; nothing while the store does not answer."""
        try:
            return {stream: offset.next_offset for stream, offset in self.store.load_offsets(partition).items()}
        except StoreError:
            return {}

    def wait_for_the_end(self, timeout_s: float = 60.0) -> None:
        """Returns when the stored offsets are the end of the log."""
        ends = self.ends()
        wait_until(
            lambda: all(self.offsets(number) == of_partition for number, of_partition in ends.items()),
            f"the workers reach the end of the log {ends}\n{self.logs()[-3000:]}",
            timeout_s,
        )

    def wait_for_progress(self, partition: int, timeout_s: float = 30.0) -> float:
        """Returns the seconds until the partition's offsets have moved on."""
        before = sum(self.offsets(partition).values())
        return wait_until(lambda: sum(self.offsets(partition).values()) > before, "a worker saves", timeout_s)

    def logs(self) -> str:
        """Returns what the workers wrote, the newest worker last."""
        return "\n".join(log.read_text() for log in sorted(self.folder.glob("worker-*.log")))

    def close(self) -> None:
        """Stops every worker, gracefully where it still can, and the store."""
        for worker in self.workers:
            worker.signal(signal.SIGCONT)
            worker.signal(signal.SIGTERM)
        for worker in self.workers:
            if not worker.ended.wait(20):
                worker.signal(signal.SIGKILL)
        if self._store is not None:
            self._store.close()


def stop_gracefully(worker: WorkerProcess, timeout_s: float = 20.0) -> None:
    """Asks a worker to stop, and sees that it does so without complaint."""
    worker.signal(signal.SIGTERM)
    assert worker.wait(timeout_s) == 0


def _toml(top: dict[str, str], sections: dict[str, dict[str, Any]]) -> str:
    lines = [f'{name} = "{value}"' for name, value in top.items()]
    for section, values in sections.items():
        lines.append(f"[{section}]")
        lines += [f"{name} = {_toml_value(value)}" for name, value in values.items()]
    return "\n".join(lines) + "\n"


def _toml_value(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return str(value) if isinstance(value, int | float) else f'"{value}"'
