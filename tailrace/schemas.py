"""JSON Schema of everything that stands on a topic, for producers and readers in any language."""

from collections.abc import Mapping
from inspect import cleandoc
from typing import Any

import msgspec

from tailrace.events import (
    SCHEMA_VERSION,
    Click,
    Context,
    DeadLetter,
    Impression,
    ItemStats,
    ModelAnnouncement,
    Rating,
)
from tailrace.items import Item

# What stands on each topic, by the name of its type.
PUBLIC_TYPES: Mapping[str, type[msgspec.Struct]] = {
    public.__name__: public
    for public in (Click, Rating, Context, Impression, Item, ItemStats, ModelAnnouncement, DeadLetter)
}


def json_schemas() -> dict[str, dict[str, Any]]:
    """Returns the JSON Schema (2020-12) of every public type, by name, each complete in itself."""
    return {name: _schema(name, public) for name, public in PUBLIC_TYPES.items()}


def _schema(name: str, public: type[msgspec.Struct]) -> dict[str, Any]:
    whole = msgspec.json.schema(public)
    parts = whole["$defs"]
    for part in parts.values():
        part["description"] = cleandoc(part["description"])
    root = parts.pop(name)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": f"urn:tailrace:schema:v{SCHEMA_VERSION}:{name}",
        **root,
        **({"$defs": parts} if parts else {}),
    }
