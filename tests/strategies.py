"""Hypothesis strategies for events and logs: few users, few items and close times, so that histories collide."""

from collections.abc import Mapping, Sequence
from typing import TypeVar

from hypothesis import strategies as st

from tailrace.events import ACTIONS, Click, Context, Impression, Ranked, Rating, UserEvent
from tailrace.ids import EventId, ItemId, ModelVersion, RequestId, UserId
from tailrace.items import Fact, Item
from tailrace.topics import USER_STREAMS

DAY_MS = 86_400_000
USERS = tuple(UserId(f"u{index}") for index in range(2))
CATALOGUE: Mapping[ItemId, Item] = {
    ItemId(f"i{index}"): Item(
        item_id=ItemId(f"i{index}"),
        title=f"Item {index}",
        tags=[f"tag{index % 3}", f"tag{index}"],
        facts=[Fact("author", f"author{index % 2}")],
    )
    for index in range(6)
}
ITEMS = (*CATALOGUE, ItemId("not-in-the-catalogue"))

users = st.sampled_from(USERS)
items = st.sampled_from(ITEMS)
event_ids = st.integers(0, 30).map(lambda number: EventId(f"e{number}"))  # few: repeats happen
moments = st.integers(0, 40 * DAY_MS) | st.integers(0, 3).map(lambda days: days * DAY_MS)


Kind = TypeVar("Kind", Click, Rating, Context)


def _event(kind: type[Kind], **fields: st.SearchStrategy[object]) -> st.SearchStrategy[Kind]:
    return st.builds(kind, event_id=event_ids, user_id=users, occurred_at=moments, **fields)


clicks = _event(
    Click,
    item_id=items,
    action=st.sampled_from(ACTIONS),
    dwell_s=st.none() | st.floats(0, 1000),
)
ratings = _event(
    Rating,
    item_id=items,
    value=st.floats(1, 5),
    review=st.none() | st.text(max_size=600),
)
contexts = _event(
    Context,
    device=st.none() | st.text(max_size=8),
    attributes=st.dictionaries(st.text(max_size=3), st.text(max_size=3) | st.floats(-1, 1) | st.booleans(), max_size=3),
    ttl_s=st.floats(1, 3600),
)


def _impression(event_id: EventId, user_id: UserId, occurred_at: int, shown: Sequence[ItemId]) -> Impression:
    return Impression(
        event_id=event_id,
        user_id=user_id,
        occurred_at=occurred_at,
        request_id=RequestId(event_id),
        model_version=ModelVersion("v0"),
        feature_names_hash="none",
        user_text="",
        shown=[Ranked(item_id=item_id, text="", features="", score=0.0, source="test") for item_id in shown],
    )


impressions = st.builds(_impression, event_ids, users, moments, st.lists(items, min_size=1, max_size=4))

STREAM_EVENTS: Mapping[str, st.SearchStrategy[UserEvent]] = {
    "clicks": clicks,
    "ratings": ratings,
    "contexts": contexts,
    "impressions": impressions,
}
assert tuple(STREAM_EVENTS) == USER_STREAMS


def logs(max_size: int = 25) -> st.SearchStrategy[dict[str, list[UserEvent]]]:
    """Returns the strategy of a partition's log: for each of the four streams, its events in the order of the log."""
    return st.fixed_dictionaries({name: st.lists(events, max_size=max_size) for name, events in STREAM_EVENTS.items()})
