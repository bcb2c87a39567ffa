"""Reads profiles for the gateway: lock-free, off the event loop, and never longer than the caller can wait."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from tailrace.errors import StoreError
from tailrace.ids import UserId
from tailrace.kafka_clients import partition_of
from tailrace.stores.store import Store


class ProfileReader:
    """Profiles as stored, by user. The store is opened at the first read, and again after it has failed."""

    def __init__(self, open_store: Callable[[], Store], partitions: int) -> None:
        self._open_store = open_store
        self._partitions = partitions
        self._store: Store | None = None
        # One thread: reads take microseconds, and a store's reader slots belong to threads.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="profiles")

    async def load(self, user_id: UserId, timeout_s: float) -> bytes | None:
        """Returns the user's profile as stored, or None for a new user. Raises StoreError, also when it is late."""
        reading = asyncio.get_running_loop().run_in_executor(self._thread, self._load, user_id)
        try:
            return await asyncio.wait_for(reading, timeout_s)
        except TimeoutError:
            raise StoreError(f"the profile store did not answer within {timeout_s:g} s") from None

    async def check(self, timeout_s: float) -> None:
        """Returns if the store answers. Raises StoreError."""
        await self.load(UserId("readiness"), timeout_s)

    def close(self) -> None:
        """Closes the store."""
        self._thread.shutdown(wait=True, cancel_futures=True)
        if self._store is not None:
            self._store.close()

    def _load(self, user_id: UserId) -> bytes | None:
        try:
            if self._store is None:
                self._store = self._open_store()
            return self._store.load_profiles(partition_of(user_id, self._partitions), [user_id]).get(user_id)
        except StoreError:
            if self._store is not None:
                self._store.close()
                self._store = None
            raise
