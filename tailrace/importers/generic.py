"""Anyone's CSV (with a header) or JSON lines, as one kind of record, by a mapping of fields to columns.

A field takes its value from the column mapped to it, else from the column of its own name, else from a constant. An
empty value is no value. Lists (`tags`) may be written `a|b|c`. `fact.<relation>` and `attributes.<name>` fill facts
and attributes. A row without an `event_id` gets one from what it says, the same at every reading.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from tailrace.errors import SettingsError
from tailrace.events import EVENT_TYPES, UserEvent
from tailrace.ids import EventId
from tailrace.importers.source import Dataset, EventIds, Held, Reading, Row, Source, parse_moment
from tailrace.items import Item

ROLES = (*EVENT_TYPES, "items")
_TIMES = ("occurred_at", "created_at")
_LISTS = ("tags", "image_vector", "audio_vector")
_GROUPS = {"fact.": "facts", "attributes.": "attributes"}


def read_csv(path: Path, reading: Reading) -> Dataset:
    """Returns a CSV file as records of `reading.role`. Raises SettingsError when the mapping does not fit the role."""
    return _read(path, reading, lambda source: source.csv())


def read_jsonl(path: Path, reading: Reading) -> Dataset:
    """Returns a file of JSON lines as records of `reading.role`. Raises SettingsError as `read_csv` does."""
    return _read(path, reading, lambda source: source.json())


def _read(path: Path, reading: Reading, rows: Callable[[Source], Iterable[tuple[int, Mapping[str, Any]]]]) -> Dataset:
    _check_mapping(reading)
    source = Source(path, reading.on_bad)
    if reading.role == "items":
        items = []
        for line, values in rows(source):
            try:
                item = msgspec.convert(_fields(values, reading, Item), Item, strict=False)
            except ValueError as error:
                source.refuse(line, error)
                continue
            items.append(Row("items", item.item_id, item, item.created_ms or 0))
        return Dataset(sorted(items, key=lambda row: row.at_ms), (), 0, 0)

    event_type: type[UserEvent] = EVENT_TYPES[reading.role]
    held: Held[tuple[bool, UserEvent]] = Held(tuple[bool, event_type])  # type: ignore[valid-type]  # chosen at run time
    for line, values in rows(source):
        try:
            fields = _fields(values, reading, event_type)
            named = "event_id" in fields
            event = msgspec.convert({"event_id": _hash(values)} | fields, event_type, strict=False)
        except ValueError as error:
            source.refuse(line, error)
            continue
        held.add(event.at_ms, (named, event))
    return Dataset((), _events(held, reading.role), *held.span_ms)


def _events(held: Held[tuple[bool, UserEvent]], role: str) -> Iterator[Row]:
    ids = EventIds(role)
    for at_ms, (named, event) in held.in_order():
        if not named:
            event = msgspec.structs.replace(event, event_id=ids.give(at_ms, event.event_id))
        yield Row(role, event.user_id, event, at_ms)


def _check_mapping(reading: Reading) -> None:
    if reading.role not in ROLES:
        raise SettingsError(f"no topic {reading.role!r} to import to; there are {', '.join(ROLES)}")
    kind = Item if reading.role == "items" else EVENT_TYPES[reading.role]
    known = [field.name for field in msgspec.structs.fields(kind)]
    for name in (*reading.columns, *reading.constants):
        grouped = any(name.startswith(group) and holder in known for group, holder in _GROUPS.items())
        if name not in known and not grouped:
            raise SettingsError(f"{reading.role} have no field {name!r}; they have {', '.join(known)}")


def _fields(values: Mapping[str, Any], reading: Reading, kind: type[UserEvent | Item]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    names = [field.name for field in msgspec.structs.fields(kind)]
    for name in (*names, *(name for name in (*reading.columns, *reading.constants) if name.startswith(tuple(_GROUPS)))):
        column = reading.columns.get(name, name)
        if name in reading.columns and column not in values:
            raise ValueError(f"no column {column!r} for {name}")
        value = values.get(column)
        value = reading.constants.get(name) if value in (None, "") else value
        if value is None:
            continue
        group, _, inner = name.partition(".")
        if group == "fact" and inner:
            found.setdefault("facts", []).extend({"relation": inner, "entity": one} for one in str(value).split("|"))
        elif inner:
            found.setdefault(group, {})[inner] = value
        elif name in _TIMES:
            found[name] = parse_moment(str(value), reading.epoch_ms)
        elif name in _LISTS and isinstance(value, str):
            found[name] = [part for part in value.split("|") if part]
        elif name.endswith("_id"):
            found[name] = str(value)  # ids are often numbers elsewhere
        else:
            found[name] = value
    return found


def _hash(values: Mapping[str, Any]) -> EventId:
    return EventId(hashlib.blake2b(msgspec.json.encode(values, order="sorted"), digest_size=8).hexdigest())
