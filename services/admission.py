"""How many requests a gateway replica works on at once, and how many may wait; the next one is refused at once."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from tailrace.errors import Overloaded


class Admission:
    """Places for `max_running` requests and room for `max_waiting` more. Belongs to one event loop."""

    def __init__(self, max_running: int, max_waiting: int) -> None:
        self.running = 0
        self.waiting = 0
        self._max_waiting = max_waiting
        self._places = asyncio.Semaphore(max_running)

    @asynccontextmanager
    async def place(self) -> AsyncIterator[None]:
        """Holds a place, after waiting for one if need be. Raises Overloaded when too many wait already."""
        if self._places.locked() and self.waiting >= self._max_waiting:
            raise Overloaded(f"{self.running} requests are being answered and {self.waiting} wait", retry_after_s=1.0)
        self.waiting += 1
        try:
            await self._places.acquire()
        finally:
            self.waiting -= 1
        self.running += 1
        try:
            yield
        finally:
            self.running -= 1
            self._places.release()
