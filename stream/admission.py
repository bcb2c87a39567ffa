"""Which records of the user streams may be folded, and what becomes of the others. Pure."""

import base64
from typing import Protocol

import msgspec

from tailrace.errors import InvalidRecord
from tailrace.events import DeadLetter, UserEvent, decode_event
from tailrace.ids import UserId

# Longest base64 of a refused value in its dead letter; the record itself stays in its topic.
MAX_DEAD_VALUE_BASE64 = 16 * 1024
_MAX_DEAD_VALUE = MAX_DEAD_VALUE_BASE64 // 4 * 3


class KafkaRecord(Protocol):
    """What is used of a kafka-python ConsumerRecord. `timestamp` is epoch ms, -1 where unknown."""

    @property
    def topic(self) -> str: ...
    @property
    def partition(self) -> int: ...
    @property
    def offset(self) -> int: ...
    @property
    def timestamp(self) -> int: ...
    @property
    def key(self) -> bytes | None: ...
    @property
    def value(self) -> bytes | None: ...


class Erasure(msgspec.Struct, frozen=True):
    """A user asked to be forgotten up to `at_ms`: a null value under the user's key."""

    user_id: UserId
    at_ms: int


def admit(stream: str, record: KafkaRecord, max_ahead_ms: float) -> UserEvent | Erasure:
    """Returns the event, or the erasure, in a record of `stream`. Raises InvalidRecord naming the field.

    An event must carry its record's key as `user_id`: the key chose the partition, and a user lives in one only.
    It may be at most `max_ahead_ms` ahead of its record's own time, and not before 1970.
    """
    key, value = record.key, record.value
    if value is None:
        return Erasure(_user_in(key), record.timestamp)
    event = decode_event(stream, value)
    if key is None or key != event.user_id.encode():
        raise InvalidRecord("differs from the record's key", field="$.user_id")
    at_ms = event.at_ms
    if at_ms > record.timestamp + max_ahead_ms and record.timestamp >= 0:
        raise InvalidRecord(
            f"{(at_ms - record.timestamp) / 1000:g} s ahead of its record; {max_ahead_ms / 1000:g} s are allowed",
            field="$.occurred_at",
        )
    if at_ms < 0:
        raise InvalidRecord("before 1970", field="$.occurred_at")
    return event


def _user_in(key: bytes | None) -> UserId:
    try:
        user_id = (key or b"").decode()
    except UnicodeDecodeError as error:
        raise InvalidRecord(f"not UTF-8: {error}", field="key") from error
    if not 1 <= len(user_id) <= 256:
        raise InvalidRecord("an erasure needs a user id of 1 to 256 characters as its key", field="key")
    return UserId(user_id)


def dead_letter(record: KafkaRecord, error: InvalidRecord) -> DeadLetter:
    """Returns the letter for a refused record: its coordinates, the reason, and its value up to 16 KiB of base64."""
    value = record.value or b""
    return DeadLetter(
        topic=record.topic,
        partition=record.partition,
        offset=record.offset,
        reason=error.reason,
        field=error.field,
        value_base64=base64.b64encode(value[:_MAX_DEAD_VALUE]).decode(),
        value_truncated=len(value) > _MAX_DEAD_VALUE,
        key=None if record.key is None else record.key.decode(errors="replace"),
    )
