"""Producers rely on the schemas: what they could write yesterday must be readable today."""

import json
from collections.abc import Callable
from copy import deepcopy
from importlib.resources import files
from typing import Any

import pytest

from tailrace.schemas import PUBLIC_TYPES, json_schemas
from tests.contract.schema_compatibility import breaking_changes

Schemas = dict[str, Any]


def published() -> Schemas:
    """The schemas as they were published with version 1."""
    schemas: Schemas = json.loads(files("tailrace.data").joinpath("schemas.v1.json").read_text(encoding="utf-8"))
    return schemas


def test_nothing_that_version_1_published_is_refused_or_lost() -> None:
    assert breaking_changes(published(), json_schemas()) == []


def test_every_schema_is_complete_in_itself_and_names_its_dialect() -> None:
    for name, schema in json_schemas().items():
        assert schema["$schema"].endswith("/2020-12/schema")
        assert schema["$id"] == f"urn:tailrace:schema:v1:{name}"
        assert schema["title"] == name
        assert schema["description"]
        text = json.dumps(schema)
        for reference in text.split('"$ref": "#/$defs/')[1:]:
            assert reference.split('"')[0] in schema["$defs"]


def test_every_public_type_has_a_schema() -> None:
    assert json_schemas().keys() == PUBLIC_TYPES.keys()


def _set(path: str, value: object) -> Callable[[Schemas], None]:
    def change(schemas: Schemas) -> None:
        *parents, last = path.split("/")
        place: Any = schemas
        for key in parents:
            place = place[int(key)] if isinstance(place, list) else place[key]
        place[last] = value

    return change


def _drop(path: str) -> Callable[[Schemas], None]:
    def change(schemas: Schemas) -> None:
        *parents, last = path.split("/")
        place: Any = schemas
        for key in parents:
            place = place[int(key)] if isinstance(place, list) else place[key]
        del place[int(last) if isinstance(place, list) else last]

    return change


CLICK = "Click/properties"

BREAKING = {
    "a type removed": (_drop("Rating"), "Rating: removed"),
    "a field removed": (_drop(f"{CLICK}/dwell_s"), "Click.dwell_s: removed"),
    "a required field removed": (_drop("Item/properties/title"), "Item.title: removed"),
    "a nested field removed": (_drop("Impression/$defs/Ranked/properties/score"), "Impression.shown[].score: removed"),
    "a type narrowed": (_set(f"{CLICK}/occurred_at", {"type": "integer"}), "Click.occurred_at: type"),
    "null no longer allowed": (_drop(f"{CLICK}/position/anyOf/1"), "Click.position: type ['null']"),
    "a number narrowed to an integer": (_set("Rating/properties/value/type", "integer"), "Rating.value: type"),
    "a new required field": (_set("Click/required", ["event_id", "user_id", "occurred_at", "item_id", "x"]), ".x: now"),
    "an optional field made required": (
        _set("Click/required", ["event_id", "user_id", "occurred_at", "item_id", "action"]),
        "Click.action: now required",
    ),
    "a maximum lowered": (_set("Context/properties/ttl_s/maximum", 60), "Context.ttl_s: maximum lowered"),
    "a minimum raised": (_set("Rating/properties/value/minimum", 0), "Rating.value: minimum raised"),
    "a maximum added": (_set("ItemStats/properties/partition/maximum", 9), "ItemStats.partition: maximum lowered"),
    "a longest length lowered": (_set(f"{CLICK}/user_id/maxLength", 255), "Click.user_id: maxLength lowered"),
    "a shortest length raised": (_set(f"{CLICK}/user_id/minLength", 2), "Click.user_id: minLength raised"),
    "a pattern added": (_set(f"{CLICK}/user_id/pattern", "^u"), "Click.user_id: pattern changed"),
    "fewer list entries allowed": (_set("Item/properties/tags/maxItems", 63), "Item.tags: maxItems lowered"),
    "an enum value removed": (_set(f"{CLICK}/action/enum", ["click", "view"]), "enum value 'purchase' removed"),
    "a string made an enum": (
        _set("Impression/properties/degraded", {"enum": ["none"]}),
        "Impression.degraded: any value narrowed",
    ),
    "unknown fields refused": (_set("Click/additionalProperties", False), "Click.values: type"),
    "a map's values narrowed": (
        _set("Context/properties/attributes/additionalProperties", {"type": "string"}),
        "Context.attributes.values: type",
    ),
    "a map's names shortened": (
        _set("Context/properties/attributes/propertyNames/maxLength", 9),
        "Context.attributes.names: maxLength lowered",
    ),
    "a list's entries narrowed": (_set("ItemStats/properties/touches_ms/items/minimum", 0), "touches_ms[]: minimum"),
    "a tuple's entry narrowed": (
        _set("ItemStats/$defs/DecayedSum/prefixItems/2/maximum", 9),
        "ItemStats.sums.values[2]: maximum lowered",
    ),
}

COMPATIBLE = {
    "a new type": _set("Order", {"type": "object"}),
    "a new optional field": _set(f"{CLICK}/price", {"type": "number"}),
    "a required field made optional": _set("Click/required", ["event_id", "user_id", "occurred_at"]),
    "another type allowed": _set(f"{CLICK}/event_id", {"anyOf": [{"type": "string"}, {"type": "integer"}]}),
    "an integer widened to a number": _set("ItemStats/properties/partition", {"type": "number"}),
    "a maximum raised": _set("Context/properties/ttl_s/maximum", 10**9),
    "a bound removed": _drop(f"{CLICK}/user_id/maxLength"),
    "an enum value added": _set(
        f"{CLICK}/action/enum", ["click", "hide", "like", "purchase", "save", "share", "skip", "view", "listen"]
    ),
    "an enum made any text": _set(f"{CLICK}/action", {"type": "string"}),
    "another description": _set("Click/description", "Something else."),
    "another default": _set("Context/properties/ttl_s/default", 60.0),
    "any value allowed": _set(f"{CLICK}/dwell_s", {}),
}


@pytest.mark.parametrize("name", BREAKING)
def test_a_breaking_change_is_found(name: str) -> None:
    change, expected = BREAKING[name]
    changed = deepcopy(published())
    change(changed)
    found = breaking_changes(published(), changed)
    assert any(expected in line for line in found), found


@pytest.mark.parametrize("name", COMPATIBLE)
def test_an_addition_is_not_a_breaking_change(name: str) -> None:
    changed = deepcopy(published())
    COMPATIBLE[name](changed)
    assert breaking_changes(published(), changed) == []
