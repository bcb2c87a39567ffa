"""A thread that gives way: work on what does not serve yet, which must not take the processor from what does.

Work comes in pieces, each begun when nobody is being answered, or after a short wait: cores share caches, and some
their arithmetic, so that even a thread of low priority slows a request beside it. A piece should let go of Python's
lock, as opening, hashing and running a graph do: a thread that gives way while it holds the lock holds up everyone.
"""

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol, TypeVar

Result = TypeVar("Result")

_NICE = 10  # as much as training gives way
_PATIENCE_S = 0.06  # about one request: under load there is no calm to wait for
_LOOK_S = 0.002


class Run(Protocol):
    """Where a piece of work is done."""

    def __call__(self, work: Callable[[], Result], /) -> Result:
        """Returns what the work returns, or raises what it raises."""


def at_once(work: Callable[[], Result], /) -> Result:
    """Does the work where it is asked for."""
    return work()


class Aside:
    """The thread that gives way; `run` is a `Run`. `calm` says whether nobody is being answered right now."""

    def __init__(self, calm: Callable[[], bool]) -> None:
        self._calm = calm
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="aside", initializer=_give_way)

    def run(self, work: Callable[[], Result], /) -> Result:
        """Does the work on the thread that gives way, at the next calm, and waits for it."""
        deadline = time.monotonic() + _PATIENCE_S
        while not self._calm() and time.monotonic() < deadline:
            time.sleep(_LOOK_S)
        return self._pool.submit(work).result()

    def close(self) -> None:
        """Ends the thread."""
        self._pool.shutdown(wait=False, cancel_futures=True)


def _give_way() -> None:
    if sys.platform == "linux":  # elsewhere a thread has no priority of its own
        with contextlib.suppress(OSError):
            nice = os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) + _NICE
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), nice)  # beyond 19 is 19
