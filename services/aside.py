"""A thread that gives way: work on what does not serve yet, which must not take the processor from what does.

What runs there should be long and let go of Python's lock, as opening, hashing and running a graph do. A thread that
gives way and holds the lock makes everyone wait who does not.
"""

import contextlib
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol, TypeVar

Result = TypeVar("Result")

_NICE = 10  # as much as training gives way


class Run(Protocol):
    """Where a piece of work is done."""

    def __call__(self, work: Callable[[], Result], /) -> Result:
        """Returns what the work returns, or raises what it raises."""


def at_once(work: Callable[[], Result], /) -> Result:
    """Does the work where it is asked for."""
    return work()


class Aside:
    """The thread that gives way; `run` is a `Run`."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="aside", initializer=_give_way)

    def run(self, work: Callable[[], Result], /) -> Result:
        """Does the work on the thread that gives way, and waits for it."""
        return self._pool.submit(work).result()

    def close(self) -> None:
        """Ends the thread."""
        self._pool.shutdown(wait=False, cancel_futures=True)


def _give_way() -> None:
    if sys.platform == "linux":  # elsewhere a thread has no priority of its own
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
