"""The events that flow through Kafka: plain JSON on the wire, typed and frozen in memory.

Every event carries `event_id` (producers retry; the id makes a retry harmless), the ids it is about, the time
it happened (`occurred_at`, ISO 8601 with a zone or epoch milliseconds; read it through `at_ms`), and the
`schema_version` it was written with. Unknown fields are ignored, so a newer producer can talk to an older reader.
"""

import re
from collections.abc import Mapping
from datetime import datetime
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta

from tailrace.errors import InvalidRecord
from tailrace.ids import (
    EventIdField,
    ItemId,
    ItemIdField,
    ModelVersion,
    RequestIdField,
    UserIdField,
)

SCHEMA_VERSION = 1

Action = Literal["view", "click", "like", "save", "share", "purchase", "skip", "hide"]
ACTIONS: tuple[Action, ...] = ("view", "click", "like", "save", "share", "purchase", "skip", "hide")

# Bounded, so that whatever is accepted can also be stored (msgpack holds 64-bit integers) and summed.
SchemaVersion = Annotated[int, Meta(ge=1, le=1_000_000)]
ScaleValue = Annotated[float, Meta(ge=-1e9, le=1e9)]

OccurredAt = Annotated[datetime, Meta(tz=True)] | Annotated[int, Meta(ge=0, le=253_402_300_799_000)]
Scalar = str | float | bool
MOST_TAGS_ANSWERED, MOST_ANSWERED = 64, 500.0  # of a user: how many, and how much of each
Amount = Annotated[float, Meta(ge=0, le=MOST_ANSWERED)]
Answer = tuple[Amount, Amount]  # how much of a tag was clicked, and how much of it shown
ShortText = Annotated[str, Meta(max_length=256)]
ShortScalar = ShortText | float | bool  # kept in profiles, so bounded


def to_ms(moment: datetime | int) -> int:
    """Returns epoch milliseconds (UTC) for an aware datetime or for epoch milliseconds."""
    return moment if isinstance(moment, int) else round(moment.timestamp() * 1000)


class Event(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What every event about a user carries."""

    event_id: EventIdField
    user_id: UserIdField
    occurred_at: OccurredAt
    schema_version: SchemaVersion = SCHEMA_VERSION

    @property
    def at_ms(self) -> int:
        """The event's own time, epoch milliseconds UTC."""
        return to_ms(self.occurred_at)


class Interaction(Event, frozen=True, kw_only=True, omit_defaults=True):
    """An event about a user and an item, with the recommendation that caused it, where one did."""

    item_id: ItemIdField
    request_id: RequestIdField | None = None
    position: Annotated[int, Meta(ge=0)] | None = None


class Click(Interaction, frozen=True, kw_only=True, omit_defaults=True):
    """A user did something with an item. `dwell_s` is the time spent on it, in seconds."""

    action: Action = "click"
    dwell_s: Annotated[float, Meta(ge=0, le=31_536_000)] | None = None


class Rating(Interaction, frozen=True, kw_only=True, omit_defaults=True):
    """A user judged an item with a number on a stated scale and, possibly, in words."""

    value: ScaleValue
    scale_min: ScaleValue = 1.0
    scale_max: ScaleValue = 5.0
    review: Annotated[str, Meta(max_length=20_000)] | None = None

    def __post_init__(self) -> None:
        if not self.scale_min < self.scale_max:
            raise ValueError(f"scale_min {self.scale_min} must be below scale_max {self.scale_max}")
        if not self.scale_min <= self.value <= self.scale_max:
            raise ValueError(f"value {self.value} is outside its scale [{self.scale_min}, {self.scale_max}]")

    @property
    def share(self) -> float:
        """The value as a share of its scale, 0 to 1."""
        return (self.value - self.scale_min) / (self.scale_max - self.scale_min)


class Context(Event, frozen=True, kw_only=True, omit_defaults=True):
    """Where, when and with what a user is. Holds for `ttl_s` seconds from `occurred_at`."""

    device: ShortText | None = None
    platform: ShortText | None = None
    locale: ShortText | None = None
    country: ShortText | None = None
    region: ShortText | None = None
    place: ShortText | None = None
    session_id: ShortText | None = None
    attributes: Annotated[dict[ShortText, ShortScalar], Meta(max_length=32)] = {}
    ttl_s: Annotated[float, Meta(gt=0, le=30 * 86_400)] = 1800.0


class Ranked(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A candidate as it was ranked: exactly what the model saw of it, and what came out.

    `features` is base64 of little-endian float32, in the order of the impression's `feature_names_hash`; `tags` are
    those that the impression's `answers` were held against.
    `propensity` is the probability with which the logging policy put this item at this position, given the items at
    the positions before it: the chance of a whole slate is the product over its positions.
    """

    item_id: ItemIdField
    text: str
    features: str
    score: float
    source: str
    position: int | None = None
    propensity: float | None = None
    explored: bool = False
    tags: Annotated[list[ShortText], Meta(max_length=64)] = []


class Impression(Event, frozen=True, kw_only=True, omit_defaults=True):
    """An answer that was given: the slate, what it was ranked on, and under which model and policy.

    `shown` is the slate in order. `unshown` is a uniform sample of the candidates that lost, for training.
    `event_id` equals `request_id`, so a retried write is one impression. `answers` are the user's until then, by tag:
    how much of it they clicked and were shown (`tailrace.tastes`).
    """

    request_id: RequestIdField
    model_version: ModelVersion
    feature_names_hash: str
    user_text: str
    shown: list[Ranked]
    unshown: list[Ranked] = []
    num_candidates: int = 0
    query: str | None = None
    context: dict[str, Scalar] = {}
    degraded: str = "none"
    profile_age_ms: int | None = None
    answers: Annotated[dict[ShortText, Answer], Meta(max_length=MOST_TAGS_ANSWERED)] = {}


class DecayedSum(msgspec.Struct, array_like=True):
    """Sums decayed to `at_ms`, one per half-life of `tailrace.counters.HALF_LIVES_S`, and the plain count."""

    at_ms: int
    sums: list[float]
    count: int


class ItemStats(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One partition's share of an item's counters, as absolute values. Readers add the partitions' shares.

    `visitors` are the newest first touches by distinct users: the time, and a number that some 1 in 65,536 users share.
    """

    item_id: ItemIdField
    partition: int
    sums: dict[str, DecayedSum]
    touches_ms: list[int] = []
    first_ms: int | None = None
    covisits: dict[ItemId, tuple[int, float]] = {}
    visitors: list[tuple[int, int]] = []
    schema_version: int = SCHEMA_VERSION


class ModelAnnouncement(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The registry's pointer has moved: every replica loads `version` and swaps in place.

    `canary`, where there is one, serves `canary_share` of the users beside it.
    """

    version: ModelVersion
    previous: ModelVersion | None
    reason: Literal["promote", "rollback", "pin", "unpin", "canary"]
    occurred_at: OccurredAt
    canary: ModelVersion | None = None
    canary_share: float = 0.0
    schema_version: int = SCHEMA_VERSION


class DeadLetter(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A record that could not be used, with its coordinates. Its key is `topic:partition:offset`.

    A crash may write one twice; the key says they are the same.
    """

    topic: str
    partition: int
    offset: int
    reason: str
    field: str
    value_base64: str
    value_truncated: bool = False
    key: str | None = None
    schema_version: int = SCHEMA_VERSION


UserEvent = Click | Rating | Context | Impression
EVENT_TYPES: Mapping[str, type[UserEvent]] = {
    "clicks": Click,
    "ratings": Rating,
    "contexts": Context,
    "impressions": Impression,
}

Record = TypeVar("Record")

_encoder = msgspec.json.Encoder()
# What msgspec finds of a whole object, and what a struct's own checks say, which begin with the name of the field.
_NAMED = re.compile(r"^(?:Object (?:missing required|contains unknown) field `(?P<found>[^`]+)`$|(?P<own>[a-z]\w*) )")
_AT = re.compile(r"^(?P<reason>.*) - at `(?P<field>\$[^`]*)`$", re.DOTALL)


def decode(decoder: msgspec.json.Decoder[Record], value: bytes) -> Record:
    """Returns the decoded record. Raises InvalidRecord naming the field when it does not fit the schema."""
    try:
        return decoder.decode(value)
    except msgspec.ValidationError as error:
        raise invalid_record(error) from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidRecord(f"not JSON: {error}") from error
    except RecursionError as error:  # a field we skip may nest as deep as its sender likes
        raise InvalidRecord("nested too deeply") from error


def invalid_record(error: msgspec.ValidationError) -> InvalidRecord:
    """Returns the InvalidRecord that says what msgspec found, with the field as a JSON path."""
    found = _AT.match(str(error))
    reason, field = (found["reason"], found["field"]) if found else (str(error), "$")
    named = _NAMED.match(reason)
    return InvalidRecord(reason, field=f"{field}.{named['found'] or named['own']}" if named else field)


def encode(record: msgspec.Struct) -> bytes:
    """Returns the record as UTF-8 JSON, defaults left out."""
    return _encoder.encode(record)


_event_decoders: dict[str, msgspec.json.Decoder[Any]] = {
    name: msgspec.json.Decoder(event_type) for name, event_type in EVENT_TYPES.items()
}


def decode_event(stream: str, value: bytes) -> UserEvent:
    """Returns the event in a record of `stream` (clicks, ratings, contexts or impressions).

    Raises InvalidRecord naming the field.

    >>> decode_event("clicks", b'{"event_id":"e1","user_id":"u1","item_id":"i1","occurred_at":0}').at_ms
    0
    """
    event: UserEvent = decode(_event_decoders[stream], value)
    return event
