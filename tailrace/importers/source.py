"""What importers share: files that know their line numbers, rows held and given back in time order, ids that repeat.

An importer reads and checks a whole folder before it gives its first record, so a bad row stops an import before
anything is sent. What it holds meanwhile costs about the size of the uncompressed file, plus 50 bytes a row.
"""

import csv
import gzip
import hashlib
import zlib
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import msgspec
import numpy as np

from tailrace.errors import InvalidRecord
from tailrace.events import UserEvent
from tailrace.ids import EventId
from tailrace.items import Item

MAX_LISTED = 20
_LATEST_S = 253_402_300_799  # the end of the year 9999

Record = TypeVar("Record")
OnBad = Callable[[InvalidRecord], None]


class Row(NamedTuple):
    """One record to produce: to the topic of `role`, under `key`. `at_ms` is its own time, epoch ms UTC."""

    role: str
    key: str
    record: UserEvent | Item
    at_ms: int


@dataclass(frozen=True)
class Dataset:
    """A folder as records. `items` come in the order they became available, `events` in time order, once."""

    items: Sequence[Row]
    events: Iterable[Row]
    first_ms: int
    last_ms: int


def stop(error: InvalidRecord) -> None:
    """Ends the import at the first bad row."""
    raise error


@dataclass
class SkipBad:
    """Passes over bad rows, counts them and keeps the first twenty."""

    count: int = 0
    listed: list[str] = field(default_factory=list)

    def __call__(self, error: InvalidRecord) -> None:
        self.count += 1
        if len(self.listed) < MAX_LISTED:
            self.listed.append(str(error))


@dataclass(frozen=True)
class Reading:
    """How to read. All but `on_bad` is for the generic formats, whose columns say nothing of what they mean.

    `columns` gives the column of each field, `constants` a value for fields that have no column, `role` the topic,
    and `epoch_ms` how many milliseconds one unit of a numeric time is.
    """

    on_bad: OnBad = stop
    role: str = "clicks"
    columns: Mapping[str, str] = field(default_factory=dict)
    constants: Mapping[str, str] = field(default_factory=dict)
    epoch_ms: int = 1


class Importer(Protocol):
    """Reads the folder (or a file in it) of one public format."""

    def __call__(self, path: Path, reading: Reading) -> Dataset:
        """Returns the records. Raises InvalidRecord naming file and line, unless `reading.on_bad` passes over it."""


class Source:
    """One text file, gzipped or not, whose rows know their lines."""

    def __init__(self, path: Path, on_bad: OnBad, fallback_encoding: str = "utf-8") -> None:
        self.path = path
        self._on_bad = on_bad
        self._fallback = fallback_encoding

    def refuse(self, line: int, reason: object) -> None:
        """Reports that a row cannot be used."""
        self._on_bad(InvalidRecord(str(reason), field=f"{self.path.name}:{line}"))

    def lines(self) -> Iterator[tuple[int, str]]:
        """Yields line number, from 1, and text without its end. Empty lines are passed over."""
        number = 0
        with self.path.open("rb") as raw, gzip.open(raw) if self.path.suffix == ".gz" else raw as file:
            try:
                for number, data in enumerate(file, start=1):
                    text = self._decode(number, data)
                    if text:
                        yield number, text
            except (EOFError, gzip.BadGzipFile, zlib.error) as error:
                # Nothing after it can be read, so there is nothing to skip to.
                raise InvalidRecord(f"damaged gzip: {error}", field=f"{self.path.name}:{number + 1}") from error

    def _decode(self, number: int, data: bytes) -> str | None:
        try:
            return data.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            if self._fallback != "utf-8":
                return data.decode(self._fallback).rstrip("\r\n")
            self.refuse(number, f"not UTF-8: {error.reason} at byte {error.start}")
            return None

    def split(self, separator: str, fewest: int) -> Iterator[tuple[int, list[str]]]:
        """Yields line number and parts of every line that has at least `fewest` parts."""
        for number, text in self.lines():
            parts = text.split(separator)
            if len(parts) < fewest:
                self.refuse(number, f"{len(parts)} fields where {fewest} are due")
            else:
                yield number, parts

    def csv(self) -> Iterator[tuple[int, dict[str, str]]]:
        """Yields the line a row starts on and its values by column, for a CSV file with a header."""
        consumed = [0]

        def texts() -> Iterator[str]:
            for number, text in self.lines():
                consumed[0] = number
                yield text + "\n"

        reader = csv.reader(texts(), strict=True)
        header = next(reader, None)
        while header is not None:
            start = consumed[0] + 1
            try:
                values = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                self.refuse(start, error)
                continue
            if len(values) != len(header):
                self.refuse(start, f"{len(values)} fields where the header has {len(header)}")
            else:
                yield start, dict(zip(header, values, strict=True))

    def json(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yields line number and object, for a file of one JSON object a line."""
        for number, text in self.lines():
            try:
                yield number, msgspec.json.decode(text, type=dict[str, Any])
            except msgspec.DecodeError as error:
                self.refuse(number, error)


class Held(Generic[Record]):
    """Rows in memory, packed, to be given back in the order of their times; equal times keep the file's order."""

    def __init__(self, kind: type[Record]) -> None:
        self._times = array("q")
        self._packed: list[bytes] = []
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder = msgspec.msgpack.Decoder(kind)

    def __len__(self) -> int:
        return len(self._packed)

    def add(self, at_ms: int, record: Record) -> None:
        """Holds a row."""
        self._times.append(at_ms)
        self._packed.append(self._encoder.encode(record))

    @property
    def span_ms(self) -> tuple[int, int]:
        """The first and the last time, epoch ms; zeros where nothing is held."""
        return (min(self._times), max(self._times)) if self._times else (0, 0)

    def in_order(self) -> Iterator[tuple[int, Record]]:
        """Yields time and row."""
        times = np.frombuffer(self._times, dtype=np.int64)
        for index in np.argsort(times, kind="stable"):
            yield self._times[index], self._decoder.decode(self._packed[index])


class EventIds:
    """Event ids that a second reading of the same data repeats: a hash of what the event says.

    Rows that say the same are told apart by their number among their like; ask in time order.
    """

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self._at_ms = -1
        self._given: dict[str, int] = {}

    def give(self, at_ms: int, *parts: object) -> EventId:
        """Returns the id of the next event that says `parts` at `at_ms`."""
        if at_ms != self._at_ms:
            self._at_ms, self._given = at_ms, {}
        text = "\x1f".join(str(part) for part in (at_ms, *parts))
        times = self._given[text] = self._given.get(text, 0) + 1
        digest = hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
        return EventId(f"{self._prefix}-{digest}" if times == 1 else f"{self._prefix}-{digest}-{times}")


def find_file(folder: Path, *names: str) -> Path | None:
    """Returns the first of `names`, as it is or gzipped, that the folder has."""
    candidates = (folder / (name + end) for name in names for end in ("", ".gz"))
    return next((path for path in candidates if path.is_file()), None)


def require_file(folder: Path, *names: str) -> Path:
    """Returns the first of `names` that the folder has. Raises InvalidRecord when it has none."""
    found = find_file(folder, *names)
    if found is None:
        raise InvalidRecord(f"has no {' or '.join(names)}, gzipped or not", field=folder.name or str(folder))
    return found


def parse_id(text: str, what: str) -> str:
    """Returns the id. Raises ValueError when it is empty or longer than 256 characters."""
    if not 1 <= len(text) <= 256:
        raise ValueError(f"{what} has {len(text)} characters; 1 to 256 are allowed")
    return text


def parse_epoch_s(text: str) -> int:
    """Returns epoch ms for epoch seconds. Raises ValueError."""
    if not text.isdecimal() or int(text) > _LATEST_S:
        raise ValueError(f"{text!r} is no time in epoch seconds")
    return int(text) * 1000


def parse_rating(text: str, low: float, high: float) -> float:
    """Returns the rating. Raises ValueError when it is no number or outside its scale."""
    value = float(text)
    if not low <= value <= high:
        raise ValueError(f"rating {text} is outside its scale [{low:g}, {high:g}]")
    return value


def parse_moment(text: str, unit_ms: int) -> int:
    """Returns epoch ms for an ISO 8601 text with a zone, or for a number of units of `unit_ms`. Raises ValueError."""
    try:
        at_ms = round(float(text) * unit_ms)
    except ValueError:
        moment = datetime.fromisoformat(text)
        if moment.tzinfo is None:
            raise ValueError(f"time {text!r} has no zone") from None
        at_ms = round(moment.timestamp() * 1000)
    if not 0 <= at_ms <= _LATEST_S * 1000:
        raise ValueError(f"time {text!r} is outside 1970 to 9999")
    return at_ms
