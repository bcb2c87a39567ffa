"""What a worker knows of items: only what a touch of one says about a user."""

import sys

import msgspec

from tailrace.ids import ItemId
from tailrace.items import decode_item
from tailrace.settings import KafkaSettings
from tailrace.table_reader import TableReader


class ItemTopics(msgspec.Struct, frozen=True):
    """The interest keys of one item: its tags and entities."""

    topics_of_interest: list[str]


class ItemTopicsTable:
    """The items table, followed in its own thread. A missing item is one that says nothing of its users."""

    def __init__(self, kafka: KafkaSettings) -> None:
        self.items: dict[ItemId, ItemTopics] = {}
        self._reader = TableReader(kafka, "items", self._apply)

    def start(self) -> None:
        """Starts reading, and returns at once."""
        self._reader.start()

    @property
    def caught_up(self) -> bool:
        """Whether every item that was announced before the start is known."""
        return self._reader.caught_up

    def stop(self) -> None:
        """Stops reading."""
        self._reader.stop()

    def _apply(self, key: str, value: bytes | None, at_ms: int) -> None:
        if value is None:
            self.items.pop(ItemId(key), None)
            return
        topics = [sys.intern(topic) for topic in decode_item(value).topics_of_interest]
        if topics:
            self.items[ItemId(key)] = ItemTopics(topics)
        else:
            self.items.pop(ItemId(key), None)
