"""The thread that gives way: it waits for a calm, but not for long, and its priority is below that of its process."""

import os
import sys
import threading
import time

import pytest

from services.aside import Aside


def test_work_is_done_and_its_failure_raised() -> None:
    aside = Aside(calm=lambda: True)
    assert aside.run(lambda: 6 * 7) == 42
    with pytest.raises(ZeroDivisionError):
        aside.run(lambda: 1 // 0)
    aside.close()


def test_work_waits_for_a_calm_but_is_done_without_one() -> None:
    looks: list[float] = []

    def calm() -> bool:
        looks.append(time.monotonic())
        return len(looks) == 3

    aside = Aside(calm)
    assert aside.run(time.monotonic) >= looks[2]
    assert len(looks) == 3
    aside.close()

    never = Aside(calm=lambda: False)
    assert never.run(lambda: "done all the same") == "done all the same"
    never.close()


@pytest.mark.skipif(sys.platform != "linux", reason="threads have a priority of their own on Linux alone")
def test_priority_is_below_that_of_whoever_asks() -> None:
    aside = Aside(calm=lambda: True)

    def niceness() -> int:
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    assert aside.run(niceness) == min(niceness() + 10, 19)
    aside.close()
