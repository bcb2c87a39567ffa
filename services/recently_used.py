"""A cache that holds what was used last, up to a total cost."""

from collections import OrderedDict
from threading import Lock
from typing import Generic, TypeVar

Value = TypeVar("Value")


class RecentlyUsed(Generic[Value]):
    """The values last used, up to a total cost. Any thread may use it."""

    def __init__(self, max_cost: int) -> None:
        self._max_cost = max_cost
        self._cost = 0
        self._held: OrderedDict[str, tuple[Value, int]] = OrderedDict()
        self._lock = Lock()

    def get(self, key: str) -> Value | None:
        """Returns the value, which is now the last used, or None."""
        with self._lock:
            found = self._held.get(key)
            if found is None:
                return None
            self._held.move_to_end(key)
            return found[0]

    def put(self, key: str, value: Value, cost: int) -> None:
        """Keeps a value, unless there is one already."""
        with self._lock:
            if key in self._held:
                return
            self._held[key] = (value, cost)
            self._cost += cost
            while self._cost > self._max_cost:
                _, (_, freed) = self._held.popitem(last=False)
                self._cost -= freed
