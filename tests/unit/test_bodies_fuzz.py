"""Whatever JSON comes in, a request or an event is refused in words or it can be used: nothing else ever escapes."""

from typing import Any

import msgspec
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from services.bodies import RecommendationRequest, decode_body, recommendation_decoder
from services.event_intake import POSTED, decode_posted, read_event
from services.problem import Problem, problem_of
from tailrace.errors import InvalidRecord
from tailrace.events import encode

NOW_MS = 1_790_000_000_000
MAX_EVENTS = 20
NUMBERS = st.integers(-(2**70), 2**70) | st.floats(allow_nan=False, allow_infinity=False)
SCALARS = st.none() | st.booleans() | NUMBERS | st.text(max_size=20)
JSON = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
)


def fields_of(*types: Any) -> st.SearchStrategy[dict[str, Any]]:
    """Objects with true field names, mostly, and any JSON in them: these get further than noise does."""
    names = sorted({name for one in types for name in one.__struct_fields__})
    return st.dictionaries(st.sampled_from(names) | st.text(max_size=8), JSON, max_size=8)


REQUESTS = fields_of(RecommendationRequest).map(lambda fields: {"user_id": "u"} | fields)
EVENTS = st.builds(
    lambda kind, given, fields: {"type": kind} | given | fields,
    st.sampled_from([*POSTED, "impression"]),
    st.just({"user_id": "u", "item_id": "i", "value": 3}) | st.just({}),
    fields_of(*(event_type for event_type, _ in POSTED.values())),
)
BODIES = st.binary(max_size=200) | (JSON | REQUESTS | EVENTS | st.lists(EVENTS, max_size=4)).map(msgspec.json.encode)
DEEP = b"[" * 100_000
LONE_SURROGATE = b'{"type":"click","user_id":"\\ud800","item_id":"i"}'


@given(BODIES)
@example(DEEP)
@example(b'{"user_id":"u","filters":{"attributes":{"a":' + DEEP)
@example(b'{"user_id":"u","n":1e999}')
@example(LONE_SURROGATE)
def test_any_body_is_a_request_or_a_problem_of_the_caller(body: bytes) -> None:
    try:
        request = decode_body(recommendation_decoder, body)
    except (Problem, InvalidRecord) as error:
        assert problem_of(error).status in (400, 422)
    else:
        assert msgspec.json.decode(msgspec.json.encode(request), type=RecommendationRequest) == request


@given(BODIES)
@example(DEEP)
@example(b'[{"type":"click","dwell_s":1e999}]')
@example(LONE_SURROGATE)
@example(b'{"type":"click","user_id":"u","item_id":"i","occurred_at":"0001-01-01T00:00:00+14:00"}')
def test_any_body_is_events_each_of_which_can_be_sent_or_is_refused(body: bytes) -> None:
    try:
        posted = decode_posted(body, MAX_EVENTS)
    except (Problem, InvalidRecord) as error:
        assert problem_of(error).status in (400, 413, 422)
        return
    for record in posted:
        try:
            stream, event = read_event(record, now_ms=NOW_MS, max_ahead_s=300.0, new_id=lambda: "new")
        except InvalidRecord:
            continue
        assert msgspec.json.decode(encode(event), type=type(event)) == event and stream in (
            "clicks",
            "ratings",
            "contexts",
        )
        assert event.user_id.encode() and event.at_ms <= NOW_MS + 300_000


@pytest.mark.parametrize("count", [MAX_EVENTS, MAX_EVENTS + 1])
def test_no_more_events_are_taken_in_one_call_than_the_setting_says(count: int) -> None:
    body = msgspec.json.encode([{}] * count)
    if count > MAX_EVENTS:
        with pytest.raises(Problem, match="21 events in one call"):
            decode_posted(body, MAX_EVENTS)
    else:
        assert len(decode_posted(body, MAX_EVENTS)) == count
