"""CI&T Deskdrop: `users_interactions.csv`, and items from `shared_articles.csv` or, failing that, `titles.csv`.

VIEW is `view`, LIKE `like`, BOOKMARK `save`. FOLLOW, which asks for news of an article, is `save` too; COMMENT CREATED,
which carries an article to others, is `share`. Region, country, session and what the user agent says of device and
platform become a Context event when they differ from the user's last one, or when that has expired; what a row leaves
empty stays as the session's last row had it. An article with no time of its own becomes available at its first event.
"""

from collections.abc import Iterator
from pathlib import Path

import msgspec

from tailrace.errors import InvalidRecord
from tailrace.events import Action, Click, Context
from tailrace.ids import ItemId, UserId
from tailrace.importers.source import (
    Dataset,
    EventIds,
    Held,
    Reading,
    Row,
    Source,
    find_file,
    parse_epoch_s,
    parse_id,
    require_file,
)
from tailrace.items import Item

ACTIONS: dict[str, Action] = {
    "VIEW": "view",
    "LIKE": "like",
    "BOOKMARK": "save",
    "FOLLOW": "save",
    "COMMENT CREATED": "share",
}
MAX_DESCRIPTION = 2000  # the first paragraphs; no ranker reads more

# The first text found in a user agent decides; phones name the desktop system they descend from, so they come first.
_AGENTS = (
    ("iPad", "tablet", "ios"),
    ("iPhone", "mobile", "ios"),
    ("iOS", "mobile", "ios"),
    ("Android", "mobile", "android"),
    ("Windows Phone", "mobile", "windows"),
    ("Windows", "desktop", "windows"),
    ("Macintosh", "desktop", "macos"),
    ("CrOS", "desktop", "chromeos"),
    ("Linux", "desktop", "linux"),
)


class _Interaction(msgspec.Struct, array_like=True):
    event_type: str
    content_id: str
    person_id: str
    session_id: str
    agent: str
    region: str
    country: str


def read_deskdrop(path: Path, reading: Reading) -> Dataset:
    """Returns a Deskdrop folder as records."""
    folder = path if path.is_dir() else path.parent
    source = Source(require_file(folder, "users_interactions.csv"), reading.on_bad)
    held, first_touch = Held(_Interaction), dict[str, int]()
    for line, row in source.csv():
        try:
            at_ms = parse_epoch_s(row["timestamp"])
            interaction = _interaction(row)
        except KeyError as error:
            raise InvalidRecord(f"the header has no column {error}", field=f"{source.path.name}:1") from error
        except ValueError as error:
            source.refuse(line, error)
            continue
        held.add(at_ms, interaction)
        first_touch[interaction.content_id] = min(at_ms, first_touch.get(interaction.content_id, at_ms))
    items = sorted(_read_articles(folder, reading, first_touch), key=lambda item: item.at_ms)
    return Dataset(items, _events(held), *held.span_ms)


def agent_device(agent: str) -> tuple[str | None, str | None]:
    """Returns device and platform as a user agent tells them, None for what it does not.

    >>> agent_device("Android - Native Mobile App")
    ('mobile', 'android')
    """
    device, platform = next(((device, platform) for text, device, platform in _AGENTS if text in agent), (None, None))
    if platform == "android" and "Mozilla" in agent and "Mobile" not in agent:
        device = "tablet"  # Android browsers on phones call themselves Mobile; those on tablets do not
    return device, platform


def _interaction(row: dict[str, str]) -> _Interaction:
    if row["eventType"] not in ACTIONS:
        raise ValueError(f"eventType {row['eventType']!r} is none of {', '.join(ACTIONS)}")
    return _Interaction(
        row["eventType"],
        parse_id(row["contentId"], "contentId"),
        parse_id(row["personId"], "personId"),
        row["sessionId"][:256],
        row["userAgent"],
        row["userRegion"][:256],
        row["userCountry"][:256],
    )


def _events(held: Held[_Interaction]) -> Iterator[Row]:
    ids = EventIds("deskdrop")
    last: dict[str, Context] = {}
    for at_ms, seen in held.in_order():
        before = last.get(seen.person_id)
        context = _context(at_ms, seen, before, ids)
        if _is_news(context, before):
            last[seen.person_id] = context
            yield Row("contexts", seen.person_id, context, at_ms)
        click = Click(
            event_id=ids.give(at_ms, seen.person_id, seen.content_id, seen.event_type),
            user_id=UserId(seen.person_id),
            item_id=ItemId(seen.content_id),
            occurred_at=at_ms,
            action=ACTIONS[seen.event_type],
        )
        yield Row("clicks", seen.person_id, click, at_ms)


def _context(at_ms: int, seen: _Interaction, last: Context | None, ids: EventIds) -> Context:
    session_id = seen.session_id or None
    device, platform = agent_device(seen.agent)
    country, region = seen.country or None, seen.region or None
    if last is not None and last.session_id == session_id:
        device, platform = device or last.device, platform or last.platform
        country, region = country or last.country, region or last.region
    return Context(
        event_id=ids.give(at_ms, seen.person_id, "context", session_id, device, platform, country, region),
        user_id=UserId(seen.person_id),
        occurred_at=at_ms,
        device=device,
        platform=platform,
        country=country,
        region=region,
        session_id=session_id,
    )


def _is_news(context: Context, last: Context | None) -> bool:
    if last is None or context.at_ms > last.at_ms + last.ttl_s * 1000:
        return True
    return _said(context) != _said(last)


def _said(context: Context) -> tuple[str | None, ...]:
    return (context.device, context.platform, context.country, context.region, context.session_id)


def _read_articles(folder: Path, reading: Reading, first_touch: dict[str, int]) -> Iterator[Row]:
    path = find_file(folder, "shared_articles.csv", "titles.csv")
    if path is None:
        return
    source = Source(path, reading.on_bad)
    for line, row in source.csv():
        if row.get("eventType", "CONTENT SHARED") != "CONTENT SHARED":
            continue  # an article taken back: its events were real all the same
        try:
            item_id = parse_id(row["contentId"], "contentId")
            shared_ms = parse_epoch_s(row["timestamp"]) if "timestamp" in row else None
            if not row["title"]:
                raise ValueError("an article needs a title")
        except KeyError as error:
            raise InvalidRecord(f"the header has no column {error}", field=f"{path.name}:1") from error
        except ValueError as error:
            source.refuse(line, error)
            continue
        at_ms = shared_ms if shared_ms is not None else first_touch.get(item_id)
        item = Item(
            item_id=ItemId(item_id),
            title=row["title"][:1000],
            tags=[row["lang"]] if row.get("lang") else [],
            description=row.get("text", "")[:MAX_DESCRIPTION],
            created_at=at_ms,
        )
        yield Row("items", item_id, item, at_ms or 0)
