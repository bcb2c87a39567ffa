"""What a profile store promises: a partition's profiles, counters and offsets change together or not at all."""

from collections.abc import Iterable, Mapping
from typing import Protocol

import msgspec

from tailrace.ids import ItemId, UserId


class Offset(msgspec.Struct, frozen=True):
    """Where a partition's state stands in one stream. `topic_id` tells a recreated topic from the old one."""

    topic_id: str
    next_offset: int


class Batch(msgspec.Struct, frozen=True, kw_only=True):
    """Everything one step of the worker changes. Values are encoded; None removes a profile."""

    profiles: Mapping[UserId, bytes | None] = {}
    counters: Mapping[ItemId, bytes | None] = {}
    offsets: Mapping[str, Offset] = {}


class Store(Protocol):
    """Profiles, counters and offsets by partition. One writer per partition, any number of readers."""

    def claim(self, partition: int) -> int:
        """Returns a new fencing token for the partition; every older token is refused from now on."""

    def save(self, partition: int, token: int, batch: Batch) -> None:
        """Writes the whole batch in one transaction. Raises Fenced when `token` is not the newest."""

    def load_offsets(self, partition: int) -> dict[str, Offset]:
        """Returns the offset the partition's state reflects, by stream."""

    def load_counters(self, partition: int) -> dict[ItemId, bytes]:
        """Returns all the partition's counters, encoded."""

    def load_profiles(self, partition: int, user_ids: Iterable[UserId]) -> dict[UserId, bytes]:
        """Returns those of the partition's profiles that exist, encoded, from one consistent snapshot."""

    def load_users(self, partition: int) -> list[UserId]:
        """Returns every user of the partition, in byte order."""

    def close(self) -> None:
        """Releases what the store holds open."""
