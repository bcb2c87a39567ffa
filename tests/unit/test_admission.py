"""Which records are folded and which become dead letters: each kind of bad input, and the field it is answered with."""

import base64
import json
from types import SimpleNamespace
from typing import Any

import pytest

from stream.admission import MAX_DEAD_VALUE_BASE64, Erasure, admit, dead_letter
from tailrace.errors import InvalidRecord
from tailrace.events import Click

AT_MS = 1_700_000_000_000
CLICK = {"event_id": "e1", "user_id": "u1", "item_id": "i1", "occurred_at": AT_MS}


def record(value: bytes | None, *, key: bytes | None = b"u1", timestamp: int = AT_MS) -> Any:
    """Returns a record as kafka-python gives them."""
    return SimpleNamespace(topic="clicks", partition=3, offset=7, timestamp=timestamp, key=key, value=value)


def click(**changes: object) -> bytes:
    """Returns a click that is right but for `changes`; a field changed to `...` is left out."""
    return json.dumps({name: value for name, value in (CLICK | changes).items() if value is not ...}).encode()


def test_valid_event_is_admitted() -> None:
    event = admit("clicks", record(click()), 300_000)
    assert isinstance(event, Click)
    assert event.at_ms == AT_MS


def test_null_value_forgets_its_user_up_to_the_time_of_the_record() -> None:
    assert admit("clicks", record(None), 300_000) == Erasure("u1", AT_MS)  # type: ignore[arg-type]  # a plain id


def test_event_just_within_the_allowed_lead_is_admitted() -> None:
    admit("clicks", record(click(occurred_at=AT_MS + 300_000)), 300_000)


BAD = {
    "not JSON": (record(b"\x00\xff"), "$"),
    "cut short": (record(click()[:20]), "$"),
    "not UTF-8": (record(b'{"event_id":"\xff"}'), "$"),
    "nested too deeply": (record(b'{"event_id":"e","x":' + b"[" * 100_000), "$"),
    "no event id": (record(click(event_id=...)), "$.event_id"),
    "empty item id": (record(click(item_id="")), "$.item_id"),
    "unknown action": (record(click(action="stare")), "$.action"),
    "no time zone": (record(click(occurred_at="2026-01-01T00:00:00")), "$.occurred_at"),
    "before 1970": (record(click(occurred_at="1969-12-31T23:59:59Z")), "$.occurred_at"),
    "from the future": (record(click(occurred_at=AT_MS + 300_001)), "$.occurred_at"),
    "a number no store can hold": (record(click(schema_version=10**30)), "$.schema_version"),
    "another user's key": (record(click(), key=b"u2"), "$.user_id"),
    "no key": (record(click(), key=None), "$.user_id"),
    "erasure without a key": (record(None, key=None), "key"),
    "erasure with a key that is not text": (record(None, key=b"\xff"), "key"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_record_is_refused_naming_the_field(kind: str) -> None:
    bad, where = BAD[kind]
    with pytest.raises(InvalidRecord) as refusal:
        admit("clicks", bad, 300_000)
    assert refusal.value.field == where
    letter = dead_letter(bad, refusal.value)
    assert (letter.topic, letter.partition, letter.offset, letter.field) == ("clicks", 3, 7, where)
    assert letter.reason


def test_dead_letter_keeps_the_value_up_to_16_kib_of_base64() -> None:
    short = dead_letter(record(b"abc"), InvalidRecord("no"))
    assert (base64.b64decode(short.value_base64), short.value_truncated) == (b"abc", False)
    long = dead_letter(record(b"x" * 20_000), InvalidRecord("no"))
    assert (len(long.value_base64), long.value_truncated) == (MAX_DEAD_VALUE_BASE64, True)
