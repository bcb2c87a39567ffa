"""One test per row of the failure table in the README: what dies, between which two steps, and what follows."""

import signal
from collections.abc import Callable

import pytest

from stream.worker import STEPS
from tests.recovery.oracle import assert_state_equals_log, assert_stats_equal_counters
from tests.recovery.scene import Scene, stop_gracefully, wait_until
from tests.recovery.traffic import produce

MakeScene = Callable[..., Scene]


@pytest.mark.parametrize("step", STEPS)
def test_worker_killed_after_a_step_leaves_the_state_of_the_log(scene: MakeScene, step: str) -> None:
    here = scene()
    produce(here.settings, seed=1, count=1500)
    # The first and then a later batch: with nothing saved, and with something to go back to.
    for batch in (1, 3):
        assert here.start_worker(die_after=step, on_batch=batch).wait(30) == -signal.SIGKILL, here.logs()[-3000:]
    survivor = here.start_worker()
    here.wait_for_the_end()
    stop_gracefully(survivor)
    assert_state_equals_log(here.settings, here.store)
    assert_stats_equal_counters(here.settings, here.store)


def test_zombie_worker_is_fenced_and_changes_nothing(scene: MakeScene) -> None:
    here = scene()
    produce(here.settings, seed=2, count=300)
    zombie = here.start_worker()
    here.wait_for_the_end()
    zombie.signal(signal.SIGSTOP)
    produce(here.settings, seed=3, count=600)
    heir = here.start_worker()
    here.wait_for_the_end()
    produce(here.settings, seed=4, count=600)
    zombie.signal(signal.SIGCONT)
    # Fenced out of every partition, the zombie ends by itself, in peace.
    assert zombie.wait(30) == 0
    here.wait_for_the_end()
    stop_gracefully(heir)
    assert_state_equals_log(here.settings, here.store)
    assert_stats_equal_counters(here.settings, here.store)


def test_graceful_stop_saves_the_batch_and_publishes_every_counter(scene: MakeScene) -> None:
    here = scene()
    produce(here.settings, seed=5, count=4000)
    worker = here.start_worker()
    wait_until(lambda: sum(here.offsets(0).values()) > 100, "the worker is in the middle of the log")
    stop_gracefully(worker)
    assert_stats_equal_counters(here.settings, here.store)
    successor = here.start_worker()
    here.wait_for_the_end()
    stop_gracefully(successor)
    assert_state_equals_log(here.settings, here.store)
    assert_stats_equal_counters(here.settings, here.store)
