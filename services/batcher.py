"""A work-conserving batcher: one thread takes whatever waits, the moment it is free. No timer, no fixed size.

Under light load a job runs alone at once; under heavy load batches grow by themselves up to `max_batch`. The queue
is bounded: what does not fit is refused at once, and so is what could not be done by its deadline, going by how long
jobs have taken of late. Without that, a queue that is too long makes every job late, and all the work is for nothing.
"""

import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from tailrace.errors import Overloaded, TooLate

_SMOOTHING = 0.2  # of the newest batch in what a job is expected to take

Job = TypeVar("Job")
Result = TypeVar("Result")


@dataclass(frozen=True, eq=False)
class _Waiting(Generic[Job, Result]):
    job: Job
    deadline: float
    future: "Future[Result]" = field(default_factory=Future)


class Batcher(Generic[Job, Result]):
    """Runs jobs in batches on one thread of its own.

    `run` takes the jobs of a batch and returns as many results, in order. What it raises goes to every caller of that
    batch. `clock` counts the same monotonic seconds as the deadlines.
    """

    def __init__(
        self,
        name: str,
        run: Callable[[list[Job]], list[Result]],
        *,
        max_batch: int,
        max_waiting: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.name = name
        self.batches = 0
        self.dropped = 0
        self._run_batch = run
        self._max_batch = max_batch
        self._max_waiting = max_waiting
        self._clock = clock
        self._job_s = 0.0  # what one job of a batch has taken of late, seconds
        self._running = 0
        self._waiting: deque[_Waiting[Job, Result]] = deque()
        self._change = threading.Condition()
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name=f"batcher-{name}", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """How many jobs wait for the thread."""
        return len(self._waiting)

    def submit(self, job: Job, deadline: float) -> "Future[Result]":
        """Returns the job's future. Raises Overloaded when the queue is full or too long, or the batcher has stopped.

        The future raises TooLate when `deadline` passed before the job was taken up.
        """
        waiting: _Waiting[Job, Result] = _Waiting(job, deadline)
        with self._change:
            if self._stopped:
                raise Overloaded(f"{self.name} has stopped")
            if len(self._waiting) >= self._max_waiting:
                raise Overloaded(f"{self.name} already has {self._max_waiting} jobs waiting")
            ahead = len(self._waiting) + self._running
            if ahead and self._clock() + (ahead + 1) * self._job_s > deadline:
                raise Overloaded(f"{self.name} has {ahead} jobs to do first, and the deadline is too near")
            self._waiting.append(waiting)
            self._change.notify()
        return waiting.future

    def stop(self) -> None:
        """Refuses new jobs, finishes those that wait, and ends the thread."""
        with self._change:
            self._stopped = True
            self._change.notify()
        self._thread.join(timeout=10)
        # The callback leads back to whoever owns this batcher: without it, the owner is freed with its last user.
        if not self._thread.is_alive():
            self._run_batch = _refuse

    def _run(self) -> None:
        while True:
            # 1. Wait for work, then take all of it that fits one batch.
            with self._change:
                while not self._waiting and not self._stopped:
                    self._change.wait()
                taken = [self._waiting.popleft() for _ in range(min(len(self._waiting), self._max_batch))]
            if not taken:
                return
            # 2. Drop what nobody waits for any more; run the rest together.
            live = self._live(taken)
            if live:
                self._answer(live)

    def _live(self, taken: list[_Waiting[Job, Result]]) -> list[_Waiting[Job, Result]]:
        now = self._clock()
        live = []
        for waiting in taken:
            if not waiting.future.set_running_or_notify_cancel():
                self.dropped += 1
            elif waiting.deadline <= now:
                self.dropped += 1
                waiting.future.set_exception(TooLate(f"{self.name}: the deadline passed before the work began"))
            else:
                live.append(waiting)
        return live

    def _answer(self, live: list[_Waiting[Job, Result]]) -> None:
        self.batches += 1
        self._running = len(live)
        started = self._clock()
        try:
            results = self._run_batch([waiting.job for waiting in live])
        except Exception as error:
            for waiting in live:
                waiting.future.set_exception(error)
            return
        finally:
            self._running = 0
        taken_s = (self._clock() - started) / len(live)
        self._job_s += _SMOOTHING * (taken_s - self._job_s) if self._job_s else taken_s
        for waiting, result in zip(live, results, strict=True):
            waiting.future.set_result(result)


def _refuse(jobs: list[Any]) -> list[Any]:
    raise AssertionError("a stopped batcher takes no jobs")
