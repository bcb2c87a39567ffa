"""The batcher: work-conserving, bounded, and honest about deadlines."""

import pytest

from services.batcher import Batcher
from tailrace.errors import Overloaded, ScoringError, TooLate
from tests.fakes import FakeClock, Gate

FAR = 1e12


def double(jobs: list[int]) -> list[int]:
    return [2 * job for job in jobs]


def test_lone_job_runs_at_once_and_alone() -> None:
    seen: list[list[int]] = []

    def run(jobs: list[int]) -> list[int]:
        seen.append(jobs)
        return double(jobs)

    batcher = Batcher("test", run, max_batch=8, max_waiting=8)
    assert batcher.submit(21, FAR).result(5) == 42
    assert seen == [[21]]
    batcher.stop()


def test_whatever_waits_is_taken_together_up_to_the_most() -> None:
    gate, seen = Gate(), []

    def run(jobs: list[int]) -> list[int]:
        seen.append(jobs)
        if jobs == [0]:
            gate.wait()
        return double(jobs)

    batcher = Batcher("test", run, max_batch=3, max_waiting=8)
    first = batcher.submit(0, FAR)
    assert gate.reached.wait(5)
    rest = [batcher.submit(job, FAR) for job in (1, 2, 3, 4)]
    gate.open()
    assert [future.result(5) for future in [first, *rest]] == [0, 2, 4, 6, 8]
    assert seen == [[0], [1, 2, 3], [4]]
    batcher.stop()


def test_full_queue_refuses_at_once() -> None:
    gate = Gate()

    def run(jobs: list[int]) -> list[int]:
        gate.wait()
        return double(jobs)

    batcher = Batcher("test", run, max_batch=1, max_waiting=2)
    running = batcher.submit(1, FAR)
    assert gate.reached.wait(5)
    waiting = [batcher.submit(job, FAR) for job in (2, 3)]
    assert batcher.waiting == 2
    with pytest.raises(Overloaded):
        batcher.submit(4, FAR)
    gate.open()
    assert [future.result(5) for future in [running, *waiting]] == [2, 4, 6]
    batcher.stop()


def test_job_past_its_deadline_is_dropped_before_it_costs_work() -> None:
    gate, clock, seen = Gate(), FakeClock(), []

    def run(jobs: list[int]) -> list[int]:
        seen.append(jobs)
        if jobs == [1]:
            gate.wait()
        return double(jobs)

    batcher = Batcher("test", run, max_batch=8, max_waiting=8, clock=clock)
    batcher.submit(1, FAR)
    assert gate.reached.wait(5)
    late, in_time = batcher.submit(2, clock.now + 1), batcher.submit(3, clock.now + 100)
    clock.advance(10)
    gate.open()
    with pytest.raises(TooLate):
        late.result(5)
    assert in_time.result(5) == 6
    assert seen == [[1], [3]] and batcher.dropped == 1
    batcher.stop()


def test_job_that_cannot_be_done_by_its_deadline_is_refused_at_once_but_never_by_an_idle_batcher() -> None:
    gate, clock = Gate(), FakeClock()

    def run(jobs: list[int]) -> list[int]:
        if jobs == [2]:
            gate.wait()
        clock.advance(10)
        return double(jobs)

    batcher = Batcher("test", run, max_batch=1, max_waiting=8, clock=clock)
    assert batcher.submit(1, FAR).result(5) == 2  # a job takes 10 s, it has learnt
    idle = batcher.submit(2, clock.now + 1)
    assert gate.reached.wait(5)
    with pytest.raises(Overloaded):
        batcher.submit(3, clock.now + 15)
    enough = batcher.submit(4, clock.now + 25)
    gate.open()
    assert [idle.result(5), enough.result(5)] == [4, 8]
    batcher.stop()


def test_cancelled_job_is_dropped() -> None:
    gate, seen = Gate(), []

    def run(jobs: list[int]) -> list[int]:
        seen.append(jobs)
        if jobs == [1]:
            gate.wait()
        return double(jobs)

    batcher = Batcher("test", run, max_batch=8, max_waiting=8)
    batcher.submit(1, FAR)
    assert gate.reached.wait(5)
    given_up, kept = batcher.submit(2, FAR), batcher.submit(3, FAR)
    assert given_up.cancel()
    gate.open()
    assert kept.result(5) == 6 and seen == [[1], [3]]
    batcher.stop()


def test_failure_reaches_every_caller_of_the_batch_and_the_next_batch_runs() -> None:
    def run(jobs: list[int]) -> list[int]:
        if 13 in jobs:
            raise ScoringError("unlucky")
        return double(jobs)

    batcher = Batcher("test", run, max_batch=8, max_waiting=8)
    with pytest.raises(ScoringError, match="unlucky"):
        batcher.submit(13, FAR).result(5)
    assert batcher.submit(2, FAR).result(5) == 4
    batcher.stop()


def test_stopped_batcher_finishes_what_waits_and_refuses_more() -> None:
    batcher = Batcher("test", double, max_batch=1, max_waiting=8)
    futures = [batcher.submit(job, FAR) for job in range(5)]
    batcher.stop()
    assert [future.result(0) for future in futures] == [0, 2, 4, 6, 8]
    with pytest.raises(Overloaded):
        batcher.submit(1, FAR)
