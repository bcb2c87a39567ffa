"""Microsoft MIND: `behaviors.tsv` and `news.tsv`. Its times carry no zone; they are taken as UTC.

A slate becomes an Impression with `request_id` mind-<impression id>-<epoch seconds>, its entries in the order given.
Nobody knows what the logging ranker saw, so their `text` and `features` are empty, their score 0 and the model version
`mind`: training on features must leave such impressions out. Each clicked entry is also a Click, at the slate's time,
with that request id and position. A user's click history has no times: once per user it becomes Clicks an hour
apart, the last one an hour before the first slate of the file, so that the profile has them and fresh counters do not.

News become items: category and subcategory as tags, entities as facts (`person`, `organisation`, `place`, `mentions`),
available since they were first shown, or since the first slate of the file.
"""

from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec

from tailrace.events import Click, Impression, Ranked
from tailrace.ids import EventId, ItemId, ModelVersion, RequestId, UserId
from tailrace.importers.source import Dataset, EventIds, Held, Reading, Row, Source, parse_id, require_file
from tailrace.items import Fact, Item

MAX_FACTS = 12
_RELATIONS = {"P": "person", "O": "organisation", "G": "place"}
_HOUR_MS = 3_600_000
_MODEL = ModelVersion("mind")


class _Slate(msgspec.Struct, array_like=True):
    impression_id: str
    user_id: str
    history: list[str]
    shown: list[str]
    clicked: list[int]


def read_mind(path: Path, reading: Reading) -> Dataset:
    """Returns a MIND folder as records. News come from all `news*.tsv` files; the first line about one wins."""
    folder = path if path.is_dir() else path.parent
    source = Source(require_file(folder, "behaviors.tsv"), reading.on_bad)
    require_file(folder, "news.tsv")
    held, first_shown, past = Held(_Slate), dict[str, int](), dict[str, list[str]]()
    for line, parts in source.split("\t", 5):
        try:
            at_ms = round(datetime.strptime(parts[2], "%m/%d/%Y %I:%M:%S %p").replace(tzinfo=UTC).timestamp() * 1000)
            slate = _slate(parts)
        except ValueError as error:
            source.refuse(line, error)
            continue
        if slate.user_id not in past:
            past[slate.user_id] = slate.history
        held.add(at_ms, msgspec.structs.replace(slate, history=[]))
        for item_id in slate.shown:
            first_shown[item_id] = min(at_ms, first_shown.get(item_id, at_ms))
    begin_ms, last_ms = held.span_ms
    longest = max((len(history) for history in past.values()), default=0)
    items = sorted(_read_news(folder, reading, first_shown, begin_ms), key=lambda row: row.at_ms)
    return Dataset(items, _events(held, past, begin_ms), begin_ms - longest * _HOUR_MS, last_ms)


def _slate(parts: list[str]) -> _Slate:
    shown, clicked = [], []
    for position, entry in enumerate(parts[4].split()):
        item_id, dash, label = entry.rpartition("-")
        if not dash or label not in ("0", "1"):
            raise ValueError(f"impression {entry!r} is not an id, a dash, and 0 or 1")
        shown.append(parse_id(item_id, "item"))
        if label == "1":
            clicked.append(position)
    return _Slate(parse_id(parts[0], "impression id"), parse_id(parts[1], "user"), parts[3].split(), shown, clicked)


def _events(held: Held[_Slate], past: dict[str, list[str]], begin_ms: int) -> Iterator[Row]:
    ids = EventIds("mind")
    yield from _history(past, begin_ms, ids)
    for at_ms, slate in held.in_order():
        request_id = RequestId(f"mind-{slate.impression_id}-{at_ms // 1000}")
        impression = Impression(
            event_id=EventId(request_id),
            user_id=UserId(slate.user_id),
            occurred_at=at_ms,
            request_id=request_id,
            model_version=_MODEL,
            feature_names_hash="",
            user_text="",
            shown=[
                Ranked(item_id=ItemId(item_id), text="", features="", score=0.0, source="mind", position=position)
                for position, item_id in enumerate(slate.shown)
            ],
            num_candidates=len(slate.shown),
        )
        yield Row("impressions", slate.user_id, impression, at_ms)
        for position in slate.clicked:
            item_id = slate.shown[position]
            click = Click(
                event_id=ids.give(at_ms, slate.impression_id, slate.user_id, item_id),
                user_id=UserId(slate.user_id),
                item_id=ItemId(item_id),
                occurred_at=at_ms,
                request_id=request_id,
                position=position,
            )
            yield Row("clicks", slate.user_id, click, at_ms)


def _history(past: dict[str, list[str]], begin_ms: int, ids: EventIds) -> Iterator[Row]:
    longest = max((len(history) for history in past.values()), default=0)
    for hours in range(longest, 0, -1):
        at_ms = begin_ms - hours * _HOUR_MS
        for user_id, history in past.items():
            if hours > len(history):
                continue
            item_id = history[len(history) - hours]
            click = Click(
                event_id=ids.give(at_ms, "history", user_id, item_id),
                user_id=UserId(user_id),
                item_id=ItemId(item_id),
                occurred_at=at_ms,
            )
            yield Row("clicks", user_id, click, at_ms)


def _read_news(folder: Path, reading: Reading, first_shown: dict[str, int], begin_ms: int) -> Iterator[Row]:
    given: set[str] = set()
    for path in sorted(folder.glob("news*.tsv*"), key=lambda one: one.name.split(".")[0]):
        source = Source(path, reading.on_bad)
        for line, parts in source.split("\t", 4):
            if parts[0] in given:
                continue
            try:
                item = _news(parts, first_shown.get(parts[0], begin_ms))
            except (ValueError, msgspec.MsgspecError) as error:
                source.refuse(line, error)
                continue
            given.add(parts[0])
            yield Row("items", item.item_id, item, first_shown.get(parts[0], begin_ms))


def _news(parts: list[str], created_ms: int) -> Item:
    entities = [
        entity for column in parts[6:8] if column for entity in msgspec.json.decode(column, type=list[dict[str, Any]])
    ]
    labels = {str(entity["WikidataId"]): entity for entity in reversed(entities) if entity.get("Label")}
    facts = [
        Fact(_RELATIONS.get(str(entity.get("Type")), "mentions"), str(entity["Label"])[:256])
        for entity in reversed(labels.values())
    ]
    item = {
        "item_id": parts[0],
        "title": parts[3],
        "tags": list(dict.fromkeys(tag for tag in parts[1:3] if tag)),
        "facts": msgspec.to_builtins(facts[:MAX_FACTS]),
        "description": parts[4] if len(parts) > 4 else "",
        "created_at": created_ms,
    }
    return msgspec.convert(item, Item)
