"""MovieLens, in its csv form (ml-latest, ml-25m) and its older dat form (ml-1m, ml-10m); MovieTweetings is alike.

Ratings become Rating events. The scale is 1 to 5 where every rating is a whole number (ml-1m), 0.5 to 5 otherwise, 0 to
10 for MovieTweetings. Films become items: title, genres as tags, January 1st of the year as `created_at`. Where the
folder or the one above it has `items.jsonl.gz` (movieId, overview, director, actors, keywords) an item gets a
description and facts from it. `tags.csv` is left out: a tag given later would tell an item's future.
"""

import re
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec

from tailrace.errors import InvalidRecord
from tailrace.events import Rating, Scalar
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
    parse_rating,
    require_file,
)
from tailrace.items import Fact, Item

MAX_KEYWORDS = 8
_TITLE = re.compile(r"^(?P<title>.*?)\s*\((?P<year>\d{4})\)\s*$", re.DOTALL)
_ARTICLE = re.compile(r"^(?P<rest>.+), (?P<article>The|A|An)$")
_NO_GENRES = "(no genres listed)"


class _Rated(msgspec.Struct, array_like=True):
    user_id: str
    item_id: str
    value: float


def read_movielens(path: Path, reading: Reading) -> Dataset:
    """Returns a MovieLens folder as records."""
    folder = _folder(path)
    ratings = require_file(folder, "ratings.csv", "ratings.dat")
    held = _read_ratings(Source(ratings, reading.on_bad), low=0.5, high=5.0)
    halves = any(rated.value % 1 for _, rated in held.in_order())
    return _dataset(folder, held, reading, prefix="ml", low=0.5 if halves else 1.0, high=5.0)


def read_movietweetings(path: Path, reading: Reading) -> Dataset:
    """Returns a MovieTweetings folder as records."""
    folder = _folder(path)
    held = _read_ratings(Source(require_file(folder, "ratings.dat"), reading.on_bad), low=0.0, high=10.0)
    return _dataset(folder, held, reading, prefix="mt", low=0.0, high=10.0)


def _folder(path: Path) -> Path:
    folder = path if path.is_dir() else path.parent
    if find_file(folder, "ratings.csv", "ratings.dat") is None:
        inner = [
            one for one in sorted(folder.iterdir()) if one.is_dir() and find_file(one, "ratings.csv", "ratings.dat")
        ]
        if len(inner) == 1:
            return inner[0]
    return folder


def _dataset(folder: Path, held: Held[_Rated], reading: Reading, *, prefix: str, low: float, high: float) -> Dataset:
    items = sorted(_read_films(folder, reading), key=lambda row: row.at_ms)
    first_ms, last_ms = held.span_ms

    def events() -> Iterator[Row]:
        ids = EventIds(prefix)
        for at_ms, rated in held.in_order():
            rating = Rating(
                event_id=ids.give(at_ms, rated.user_id, rated.item_id, rated.value),
                user_id=UserId(rated.user_id),
                item_id=ItemId(rated.item_id),
                occurred_at=at_ms,
                value=rated.value,
                scale_min=low,
                scale_max=high,
            )
            yield Row("ratings", rated.user_id, rating, at_ms)

    return Dataset(items, events(), first_ms, last_ms)


def _read_ratings(source: Source, low: float, high: float) -> Held[_Rated]:
    held = Held(_Rated)
    for line, (user, item, value, seconds) in _rows(source, ["userId", "movieId", "rating", "timestamp"]):
        try:
            rated = _Rated(parse_id(user, "user"), parse_id(item, "item"), parse_rating(value, low, high))
            held.add(parse_epoch_s(seconds), rated)
        except ValueError as error:
            source.refuse(line, error)
    return held


def _rows(source: Source, columns: list[str]) -> Iterator[tuple[int, list[str]]]:
    if ".dat" in source.path.suffixes:
        for line, parts in source.split("::", len(columns)):
            yield line, parts[: len(columns)]
        return
    for line, row in source.csv():
        try:
            yield line, [row[column] for column in columns]
        except KeyError as error:
            raise InvalidRecord(f"the header has no column {error}", field=f"{source.path.name}:1") from error


def _read_films(folder: Path, reading: Reading) -> Iterator[Row]:
    path = find_file(folder, "movies.csv", "movies.dat")
    if path is None:
        return
    known = _read_enrichment(folder, reading)
    source = Source(path, reading.on_bad, fallback_encoding="latin-1" if ".dat" in path.suffixes else "utf-8")
    for line, (movie_id, title, genres) in _rows(source, ["movieId", "title", "genres"]):
        try:
            item = _film(parse_id(movie_id, "item"), title, genres, known.get(movie_id, {}))
        except (ValueError, msgspec.ValidationError) as error:
            source.refuse(line, error)
            continue
        created_ms = item.created_ms
        yield Row("items", item.item_id, item, 0 if created_ms is None else created_ms)


def _film(item_id: str, titled: str, genres: str, known: dict[str, Any]) -> Item:
    found = _TITLE.match(titled)
    title = found["title"] if found else titled.strip()
    if turned := _ARTICLE.match(title):
        title = f"{turned['article']} {turned['rest']}"
    year = int(found["year"]) if found else None
    facts = [Fact("director", known["director"])] if known.get("director") else []
    facts += [Fact("actor", actor) for actor in known.get("actors") or []]
    facts += [Fact("about", keyword) for keyword in (known.get("keywords") or [])[:MAX_KEYWORDS]]
    attributes: dict[str, Scalar] = {} if year is None else {"year": float(year)}
    item = Item(
        item_id=ItemId(item_id),
        title=title,
        tags=[genre for genre in genres.split("|") if genre and genre != _NO_GENRES],
        facts=facts,
        description=known.get("overview") or known.get("tagline") or "",
        attributes=attributes,
        created_at=round(datetime(year, 1, 1, tzinfo=UTC).timestamp() * 1000) if year else None,
    )
    return msgspec.convert(msgspec.to_builtins(item), Item)  # the lengths and bounds every reader will check


def _read_enrichment(folder: Path, reading: Reading) -> dict[str, dict[str, Any]]:
    path = find_file(folder, "items.jsonl") or find_file(folder.parent, "items.jsonl")
    if path is None:
        return {}
    return {str(row.get("movieId")): row for _, row in Source(path, reading.on_bad).json()}
