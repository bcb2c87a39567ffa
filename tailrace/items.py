"""Items: what can be recommended, as text, tags, facts and attributes. A null record on `items` removes one."""

from datetime import datetime
from typing import Annotated

import msgspec
from msgspec import Meta

from tailrace.events import SCHEMA_VERSION, Scalar, ShortText, decode, to_ms
from tailrace.ids import ItemIdField

Vector = Annotated[list[float], Meta(max_length=4096)]
TAG = "tag:"  # how the interest key of a tag begins
_FIRST_MS, _LAST_MS = -62_135_596_800_000, 253_402_300_799_000  # the years 1 to 9999, as a datetime has them


class Fact(msgspec.Struct, frozen=True):
    """One edge of the knowledge graph: this item stands in `relation` to `entity` (author, director, brand)."""

    relation: ShortText
    entity: ShortText


class Item(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Something that can be recommended. `created_at` is when it became available; absent means when announced."""

    item_id: ItemIdField
    title: Annotated[str, Meta(min_length=1, max_length=1000)]
    tags: Annotated[list[ShortText], Meta(max_length=64)] = []
    facts: Annotated[list[Fact], Meta(max_length=64)] = []
    description: Annotated[str, Meta(max_length=20_000)] = ""
    attributes: dict[ShortText, Scalar] = {}
    image_vector: Vector | None = None
    audio_vector: Vector | None = None
    created_at: Annotated[datetime, Meta(tz=True)] | int | None = None
    schema_version: Annotated[int, Meta(ge=1)] = SCHEMA_VERSION

    @property
    def created_ms(self) -> int | None:
        """When the item became available, epoch milliseconds UTC; negative before 1970, and never beyond the calendar.

        A number is taken as it comes, but what the calendar does not hold would not fit the catalogue's arrays.
        """
        return None if self.created_at is None else min(max(to_ms(self.created_at), _FIRST_MS), _LAST_MS)

    @property
    def topics_of_interest(self) -> list[str]:
        """What a touch of this item says about a user: its tags and its entities, as interest keys, each once."""
        keys = [f"{TAG}{tag}" for tag in self.tags] + [f"{fact.relation}:{fact.entity}" for fact in self.facts]
        return list(dict.fromkeys(keys))


_decoder = msgspec.json.Decoder(Item)


def decode_item(value: bytes) -> Item:
    """Returns the item in a record of `items`. Raises InvalidRecord naming the field."""
    return decode(_decoder, value)
