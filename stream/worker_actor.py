"""A stream worker as a Ray actor: the loop in a thread of its own, questions answered beside it.

Ray starts the process again when it dies, with the same arguments; `__init__` claims the partitions anew, which
fences whatever is left of the old process.
"""

import hashlib
import os
import threading
import time
from collections.abc import Sequence
from typing import Any

import msgspec
import ray
import structlog

from stream.progress import Progress
from stream.worker import StreamWorker, relax_garbage_collection
from tailrace.settings import Settings
from tailrace.stores import open_store
from tailrace.telemetry import configure_logging

NAMESPACE = "tailrace"
PREFIX = "tailrace-worker-"

log = structlog.get_logger()


class WorkerActor:
    """One worker, from the moment the actor exists until `stop`."""

    def __init__(self, settings: Settings, partitions: Sequence[int]) -> None:
        configure_logging(settings)
        relax_garbage_collection()
        self._settings = settings
        self._partitions = tuple(partitions)
        self._worker: StreamWorker | None = None
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="stream-worker", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            store = open_store(self._settings)
            self._worker = StreamWorker(self._settings, self._partitions, store)
            if not self._stopping.is_set():
                self._worker.run()
            store.close()
        except BaseException:
            log.exception("the stream worker died", partitions=self._partitions)
            time.sleep(1.0)  # whatever it was, do not start again in a tight loop
            os._exit(1)  # Ray starts the actor again

    def describe(self) -> tuple[str, tuple[int, ...]]:
        """Returns what the worker was started with: the fingerprint of its settings, and its partitions."""
        return fingerprint(self._settings), self._partitions

    def progress(self) -> Progress:
        """Returns how far the worker has come."""
        worker = self._worker
        return Progress(pid=os.getpid()) if worker is None else worker.progress()

    def stop(self) -> bool:
        """Stops the worker gracefully, and returns whether it has ended."""
        self._stopping.set()
        if self._worker is not None:
            self._worker.stop()
        self._thread.join(timeout=15)
        return not self._thread.is_alive()


def fingerprint(settings: Settings) -> str:
    """Returns a short name of exactly these settings."""
    return hashlib.sha256(msgspec.json.encode(settings)).hexdigest()[:16]


def start_actor(number: int, settings: Settings, partitions: Sequence[int]) -> Any:
    """Returns the handle of a new detached worker actor. Raises ValueError while its name is still taken."""
    actor = ray.remote(WorkerActor).options(
        name=f"{PREFIX}{number}",
        namespace=NAMESPACE,
        lifetime="detached",
        num_cpus=0.5,
        max_concurrency=4,
        max_restarts=-1,
        max_task_retries=-1,
    )
    return actor.remote(settings, tuple(partitions))
