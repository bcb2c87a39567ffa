"""What loaded versions are made of, held once: versions that have a part in common share it.

A part goes by what it was made of, the sums of its files above all, so a version that comes finds what is there already
and reads nothing anew: a round that leaves the layers that embed as they are leaves the item encoder as it is, to the
byte, and with it all that was encoded of the catalogue. One in which the head alone learned leaves the user encoder
and with it what was encoded of the users of late: a swap does not make them wait.
"""

from collections.abc import Callable, Hashable
from typing import Any, TypeVar
from weakref import WeakValueDictionary

Part = TypeVar("Part")


class Parts:
    """Parts by what they were made of, for as long as something uses them. One thread makes them."""

    def __init__(self) -> None:
        self._held: WeakValueDictionary[Hashable, Any] = WeakValueDictionary()

    def get(self, made_of: Hashable, make: Callable[[], Part]) -> Part:
        """Returns the part that is held, or one just made."""
        part: Part | None = self._held.get(made_of)
        if part is None:
            part = make()
            self._held[made_of] = part
        return part
