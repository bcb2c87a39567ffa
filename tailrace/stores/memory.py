"""A store in this process's memory: for tests, and for folds whose result is read at once and thrown away."""

import threading
from collections.abc import Iterable

from tailrace.errors import Fenced
from tailrace.ids import ItemId, UserId
from tailrace.stores.store import Batch, Offset


class _Partition:
    def __init__(self) -> None:
        self.token = 0
        self.profiles: dict[UserId, bytes] = {}
        self.counters: dict[ItemId, bytes] = {}
        self.offsets: dict[str, Offset] = {}


class MemoryStore:
    """Implements `tailrace.stores.store.Store`. Threads may share it; processes cannot."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._partitions: dict[int, _Partition] = {}

    def claim(self, partition: int) -> int:
        """Returns a new fencing token for the partition; every older token is refused from now on."""
        with self._lock:
            held = self._partitions.setdefault(partition, _Partition())
            held.token += 1
            return held.token

    def save(self, partition: int, token: int, batch: Batch) -> None:
        """Writes the whole batch at once. Raises Fenced when `token` is not the newest."""
        with self._lock:
            held = self._held(partition)
            if token != held.token:
                raise Fenced(partition, token, held.token)
            for user_id, profile in batch.profiles.items():
                if profile is None:
                    held.profiles.pop(user_id, None)
                else:
                    held.profiles[user_id] = profile
            for item_id, counters in batch.counters.items():
                if counters is None:
                    held.counters.pop(item_id, None)
                else:
                    held.counters[item_id] = counters
            held.offsets |= batch.offsets

    def load_offsets(self, partition: int) -> dict[str, Offset]:
        """Returns the offset the partition's state reflects, by stream."""
        with self._lock:
            return dict(self._held(partition).offsets)

    def load_counters(self, partition: int) -> dict[ItemId, bytes]:
        """Returns all the partition's counters, encoded."""
        with self._lock:
            return dict(self._held(partition).counters)

    def load_profiles(self, partition: int, user_ids: Iterable[UserId]) -> dict[UserId, bytes]:
        """Returns those of the partition's profiles that exist, encoded, from one consistent snapshot."""
        with self._lock:
            profiles = self._held(partition).profiles
            return {user_id: profiles[user_id] for user_id in user_ids if user_id in profiles}

    def load_users(self, partition: int) -> list[UserId]:
        """Returns every user of the partition, in byte order."""
        with self._lock:
            return sorted(self._held(partition).profiles)  # code points sort as their UTF-8 bytes do

    def close(self) -> None:
        """Forgets everything."""
        with self._lock:
            self._partitions.clear()

    def _held(self, partition: int) -> _Partition:
        return self._partitions.get(partition) or _Partition()
