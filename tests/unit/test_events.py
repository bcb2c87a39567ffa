"""Events on the wire: what is accepted, what is refused, and what the refusal names."""

import json
from datetime import UTC, datetime, timedelta, timezone
from importlib.resources import files
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tailrace.errors import InvalidRecord
from tailrace.events import EVENT_TYPES, Click, DeadLetter, Rating, decode, decode_event, encode
from tailrace.items import decode_item
from tailrace.schemas import PUBLIC_TYPES
from tailrace.topics import USER_STREAMS
from tests.strategies import STREAM_EVENTS

EXAMPLES: dict[str, dict[str, Any]] = json.loads(
    files("tailrace.data").joinpath("examples.json").read_text(encoding="utf-8")
)
REMOVED = object()


def written(name: str, **changes: object) -> bytes:
    """The documented example of a type, with some fields changed or removed."""
    fields = EXAMPLES[name] | changes
    return json.dumps({key: value for key, value in fields.items() if value is not REMOVED}).encode()


def refusal(stream: str, value: bytes) -> InvalidRecord:
    with pytest.raises(InvalidRecord) as caught:
        decode_event(stream, value)
    return caught.value


@pytest.mark.parametrize("name", PUBLIC_TYPES)
def test_the_documented_example_of_each_type_decodes_and_comes_back(name: str) -> None:
    decoder = msgspec.json.Decoder(PUBLIC_TYPES[name])
    record = decode(decoder, json.dumps(EXAMPLES[name]).encode())
    assert decode(decoder, encode(record)) == record
    assert json.loads(encode(record)).keys() == EXAMPLES[name].keys(), "an example shows only what is not a default"


def test_every_public_type_has_a_documented_example() -> None:
    assert EXAMPLES.keys() == PUBLIC_TYPES.keys()


def test_every_user_stream_has_an_event_type() -> None:
    assert tuple(EVENT_TYPES) == USER_STREAMS


@pytest.mark.parametrize("stream", USER_STREAMS)
def test_any_event_comes_back_as_it_was_sent(stream: str) -> None:
    @given(STREAM_EVENTS[stream])
    def comes_back(event: Any) -> None:
        assert decode_event(stream, encode(event)) == event

    comes_back()


@given(
    st.datetimes(datetime(1970, 1, 2), datetime(2199, 1, 1), timezones=st.just(UTC)),
    st.integers(-23 * 60, 23 * 60),
)
def test_iso_with_a_zone_and_epoch_milliseconds_are_the_same_time(moment: datetime, zone_minutes: int) -> None:
    moment = moment.replace(microsecond=moment.microsecond // 1000 * 1000)
    since = moment - datetime(1970, 1, 1, tzinfo=UTC)
    epoch_ms = since // timedelta(milliseconds=1)
    local = moment.astimezone(timezone(timedelta(minutes=zone_minutes)))
    from_text = decode_event("clicks", written("Click", occurred_at=local.isoformat()))
    from_number = decode_event("clicks", written("Click", occurred_at=epoch_ms))
    assert from_text.at_ms == from_number.at_ms == epoch_ms


def test_fields_from_a_newer_producer_are_ignored() -> None:
    newer = written("Click", schema_version=2, colour="blue", nested={"a": [1, {"b": None}]})
    assert decode_event("clicks", newer) == decode_event("clicks", written("Click", schema_version=2))


def test_a_field_nested_without_end_is_refused() -> None:
    value = written("Click")[:-1] + b',"deep":' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    assert "nested" in refusal("clicks", value).reason


@pytest.mark.parametrize(
    ("stream", "value", "field"),
    [
        ("clicks", b"", "$"),
        ("clicks", b"not json", "$"),
        ("clicks", b'{"event_id":', "$"),
        ("clicks", b"\xff\xfe", "$"),
        ("clicks", b"[]", "$"),
        ("clicks", b"null", "$"),
        ("clicks", b'{"event_id": "\xff"}', "$"),
        ("clicks", b'{"event_id": "\\ud800"}', "$"),
        ("clicks", written("Click", event_id=7), "$.event_id"),
        ("clicks", written("Click", event_id=""), "$.event_id"),
        ("clicks", written("Click", user_id=""), "$.user_id"),
        ("clicks", written("Click", user_id="x" * 257), "$.user_id"),
        ("clicks", written("Click", item_id=None), "$.item_id"),
        ("clicks", written("Click", action="stare"), "$.action"),
        ("clicks", written("Click", dwell_s=-1), "$.dwell_s"),
        ("clicks", written("Click", dwell_s="long"), "$.dwell_s"),
        ("clicks", written("Click").replace(b"41.5", b"1e999"), "$.dwell_s"),
        ("clicks", written("Click", position=-1), "$.position"),
        ("clicks", written("Click", position=1.5), "$.position"),
        ("clicks", written("Click", request_id=""), "$.request_id"),
        ("clicks", written("Click", occurred_at="2026-03-01T18:30:05"), "$.occurred_at"),
        ("clicks", written("Click", occurred_at="yesterday"), "$.occurred_at"),
        ("clicks", written("Click", occurred_at="2026-02-30T00:00:00Z"), "$.occurred_at"),
        ("clicks", written("Click", occurred_at=-1), "$.occurred_at"),
        ("clicks", written("Click", occurred_at=10**18), "$.occurred_at"),
        ("clicks", written("Click", occurred_at=1.5), "$.occurred_at"),
        ("clicks", written("Click", occurred_at=True), "$.occurred_at"),
        ("clicks", written("Click", occurred_at=None), "$.occurred_at"),
        ("clicks", written("Click", schema_version=0), "$.schema_version"),
        ("clicks", written("Click", schema_version=10**30), "$.schema_version"),
        ("ratings", written("Rating", value="good"), "$.value"),
        ("ratings", written("Rating", review="x" * 20_001), "$.review"),
        ("ratings", written("Rating", scale_max=1e300), "$.scale_max"),
        ("contexts", written("Context", device="x" * 257), "$.device"),
        ("contexts", written("Context", ttl_s=0), "$.ttl_s"),
        ("contexts", written("Context", ttl_s=10**9), "$.ttl_s"),
        ("contexts", written("Context", attributes=[1]), "$.attributes"),
        ("contexts", written("Context", attributes={"a": {}}), "$.attributes[...]"),
        ("contexts", written("Context", attributes={"a": "x" * 257}), "$.attributes[...]"),
        ("contexts", written("Context", attributes={str(index): 1 for index in range(33)}), "$.attributes"),
        ("impressions", written("Impression", shown=[{}]), "$.shown[0].item_id"),
        ("impressions", written("Impression", shown="all"), "$.shown"),
    ],
)
def test_a_malformed_event_is_refused_naming_the_field(stream: str, value: bytes, field: str) -> None:
    assert refusal(stream, value).field == field


@pytest.mark.parametrize("stream", USER_STREAMS)
def test_a_missing_field_is_named(stream: str) -> None:
    event_type = EVENT_TYPES[stream]
    for field in msgspec.structs.fields(event_type):
        if field.required:
            error = refusal(stream, written(event_type.__name__, **{field.name: REMOVED}))
            assert f"`{field.name}`" in error.reason


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"value": 9}, "outside its scale"),
        ({"value": 0}, "outside its scale"),
        ({"scale_min": 5, "scale_max": 5}, "must be below"),
        ({"scale_min": 5, "scale_max": 1}, "must be below"),
    ],
)
def test_a_rating_off_its_scale_is_refused(changes: dict[str, object], words: str) -> None:
    assert words in refusal("ratings", written("Rating", **changes)).reason


@pytest.mark.parametrize(("value", "share"), [(0.5, 0.0), (2.75, 0.5), (5, 1.0)])
def test_a_rating_is_read_as_a_share_of_its_scale(value: float, share: float) -> None:
    rating = decode_event("ratings", written("Rating", value=value))
    assert isinstance(rating, Rating)
    assert rating.share == share


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"title": ""}, "$.title"),
        ({"title": "x" * 1001}, "$.title"),
        ({"tags": ["x"] * 65}, "$.tags"),
        ({"tags": "mystery"}, "$.tags"),
        ({"facts": [{"relation": "author"}]}, "$.facts[0].entity"),
        ({"description": "x" * 20_001}, "$.description"),
        ({"image_vector": ["a"]}, "$.image_vector[0]"),
        ({"created_at": "2026-02-27T09:00:00"}, "$.created_at"),
        ({"item_id": 3}, "$.item_id"),
    ],
)
def test_a_malformed_item_is_refused_naming_the_field(changes: dict[str, object], field: str) -> None:
    with pytest.raises(InvalidRecord) as caught:
        decode_item(written("Item", **changes))
    assert caught.value.field == field


def test_an_item_may_be_older_than_1970() -> None:
    item = decode_item(written("Item", created_at="1860-11-26T00:00:00Z"))
    assert item.created_ms is not None
    assert item.created_ms < 0


def test_an_item_speaks_for_its_tags_and_its_entities() -> None:
    item = decode_item(written("Item"))
    assert item.topics_of_interest == ["tag:mystery", "tag:gothic", "author:Wilkie Collins"]


def test_an_item_that_repeats_a_tag_or_a_fact_speaks_for_it_once() -> None:
    fact = b'{"relation":"author","entity":"Wilkie Collins"}'
    tags = b'["gothic","mystery","gothic"]'
    item = decode_item(b'{"item_id":"i","title":"t","tags":%b,"facts":[%b,%b]}' % (tags, fact, fact))
    assert item.topics_of_interest == ["tag:gothic", "tag:mystery", "author:Wilkie Collins"]


def test_defaults_are_not_written() -> None:
    shortest = b'{"event_id":"e","user_id":"u","item_id":"i","occurred_at":0}'
    click = decode_event("clicks", shortest)
    assert isinstance(click, Click)
    assert (click.action, click.schema_version) == ("click", 1)
    assert json.loads(encode(click)) == json.loads(shortest)


def test_a_dead_letter_keeps_the_coordinates() -> None:
    letter = decode(msgspec.json.Decoder(DeadLetter), written("DeadLetter"))
    assert (letter.topic, letter.partition, letter.offset, letter.field) == ("clicks", 5, 1024, "$.dwell_s")
