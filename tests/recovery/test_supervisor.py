"""The supervisor on a real Ray: workers killed and stalled are replaced, and their number follows the lag."""

import os
import signal
import threading
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import ray

from deploy.ray_cluster import ray_cluster
from stream.progress import Progress
from stream.supervisor import supervise
from stream.worker_actor import NAMESPACE
from tests.recovery.oracle import assert_state_equals_log
from tests.recovery.scene import Scene, wait_until
from tests.recovery.traffic import Traffic, produce
from tests.servers import free_port

MakeScene = Callable[..., Scene]


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    """A Ray of this module's own, on loopback."""
    with ray_cluster():
        yield


@contextmanager
def _supervised(here: Scene, *, leave_running: bool = False) -> Iterator[None]:
    stop = threading.Event()
    thread = threading.Thread(
        target=supervise, args=(here.settings,), kwargs={"stop": stop, "leave_running": leave_running}
    )
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(timeout=60)
        assert not thread.is_alive(), "the supervisor did not stop"


def _workers() -> dict[str, Progress]:
    """Asks every worker that exists for its progress; one that does not answer at once is left out."""
    found: dict[str, Progress] = {}
    for row in ray.util.list_named_actors(all_namespaces=True):
        try:
            worker: Any = ray.get_actor(row["name"], namespace=NAMESPACE)
            found[row["name"]] = ray.get(worker.progress.remote(), timeout=1)
        except (ValueError, ray.exceptions.RayError):
            continue
    return found


def _wait_for_workers(count: int) -> dict[str, Progress]:
    found: dict[str, Progress] = {}

    def are_ready() -> bool:
        nonlocal found
        found = _workers()
        return len(found) == count and all(progress.ready for progress in found.values())

    wait_until(are_ready, f"{count} workers", timeout_s=60)
    return found


@pytest.mark.usefixtures("local_ray")
def test_killed_and_stalled_workers_are_replaced_and_lose_nothing(scene: MakeScene) -> None:
    port = free_port()
    here = scene(metrics_port=port, stall_s=8.0)

    def metric(sample: str) -> float:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
            values = dict(line.rsplit(" ", 1) for line in answer.read().decode().splitlines() if line[0] != "#")
        return float(values.get(sample, "-1"))

    restarts = 'tailrace_stream_restarts_total{worker="0"}'
    with _supervised(here):
        [first] = _wait_for_workers(1).values()
        produce(here.settings, seed=11, count=500)
        here.wait_for_the_end()

        wait_until(lambda: metric('tailrace_stream_events_total{worker="0"}') > 0, "the supervisor knows the worker")
        os.kill(first.pid, signal.SIGKILL)
        produce(here.settings, seed=12, count=500)
        here.wait_for_the_end()
        [second] = _wait_for_workers(1).values()
        assert second.pid != first.pid

        wait_until(lambda: metric(restarts) == 1, "a restart is counted")
        os.kill(second.pid, signal.SIGSTOP)  # alive, and of no use
        produce(here.settings, seed=13, count=500)
        here.wait_for_the_end()
        [third] = _wait_for_workers(1).values()
        assert third.pid != second.pid

        wait_until(lambda: metric(restarts) == 2, "two restarts are counted")
        wait_until(lambda: metric('tailrace_stream_lag_records{partition="1"}') == 0, "no lag is left")
        assert metric('tailrace_stream_events_total{worker="0"}') > 0
    assert _workers() == {}, "the supervisor stopped its workers"
    assert_state_equals_log(here.settings, here.store)


@pytest.mark.usefixtures("local_ray")
def test_lag_brings_a_second_worker_and_the_next_supervisor_adopts_both(scene: MakeScene) -> None:
    here = scene(metrics_port=0, lag_per_worker=1)
    with _supervised(here, leave_running=True):
        _wait_for_workers(1)
        # Without end, or the first worker is done before the supervisor looks.
        traffic = Traffic(here.settings, seed=14, per_s=400).start()
        before = _wait_for_workers(2)
        traffic.stop()
        assert sorted(progress.partitions for progress in before.values()) == [(0,), (1,)]
    with _supervised(here):
        produce(here.settings, seed=15, count=200)
        here.wait_for_the_end()
        after = _wait_for_workers(2)
        assert {name: progress.pid for name, progress in after.items()} == {
            name: progress.pid for name, progress in before.items()
        }
    assert _workers() == {}
    assert_state_equals_log(here.settings, here.store)
