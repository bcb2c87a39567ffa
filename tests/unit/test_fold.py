"""The fold's promises. The central one: a state depends on each stream's order, never on how streams interleave."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import exp2
from random import Random
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tailrace.counters import HALF_LIVES_S, MAX_COVISITS, MAX_TOUCHES, CounterTable, decode_counters, encode_counters
from tailrace.events import Click, Impression, Ranked, Rating, UserEvent
from tailrace.fold import STREAMS, Outcome, Stream, fold_erasure, fold_event
from tailrace.ids import EventId, ItemId, ModelVersion, RequestId, UserId
from tailrace.items import Item
from tailrace.profile import (
    INTEREST_HALF_LIFE_MS,
    MAX_EVENT_IDS,
    MAX_INTERESTS,
    MAX_LAST_ITEMS,
    MAX_RECENT,
    MAX_REVIEW_CHARS,
    MAX_REVIEWS,
    MAX_SEEN,
    Profile,
    decode_profile,
    encode_profile,
)
from tests import strategies
from tests.strategies import CATALOGUE, DAY_MS, USERS

U1 = UserId("u1")


class Erasure(NamedTuple):
    user_id: UserId
    at_ms: int


Step = UserEvent | Erasure
Log = Mapping[str, Sequence[Step]]


@dataclass
class State:
    """A partition's state, folded in memory."""

    profiles: dict[UserId, Profile] = field(default_factory=dict)
    counters: CounterTable = field(default_factory=CounterTable)

    def fold(self, stream: str, step: Step) -> Outcome | None:
        profile = self.profiles.setdefault(step.user_id, Profile(step.user_id))
        if isinstance(step, Erasure):
            assert stream in STREAMS
            of_stream: Stream = stream
            self.profiles[step.user_id] = fold_erasure(profile, step.at_ms, [of_stream])
            return None
        return fold_event(step, profile, self.counters, CATALOGUE.get(getattr(step, "item_id", ItemId(""))))

    def stored(self) -> dict[str, bytes]:
        """The bytes a store would hold."""
        profiles = {f"profile {user}": encode_profile(profile) for user, profile in self.profiles.items()}
        counters = {f"counters {item}": encode_counters(held) for item, held in self.counters.items.items()}
        return profiles | counters

    def reloaded(self) -> "State":
        """The state after a crash: what was stored, read again."""
        return State(
            {user: decode_profile(encode_profile(profile)) for user, profile in self.profiles.items()},
            CounterTable({item: decode_counters(encode_counters(held)) for item, held in self.counters.items.items()}),
        )


def folded(steps: Iterable[tuple[str, Step]]) -> State:
    state = State()
    for stream, step in steps:
        state.fold(stream, step)
    return state


def in_order(log: Log) -> list[tuple[str, Step]]:
    return [(stream, step) for stream, steps in log.items() for step in steps]


@st.composite
def interleavings(draw: st.DrawFn, log: Log) -> list[tuple[str, Step]]:
    """One way to read the four streams: each in its own order, mixed in any way."""
    turns = draw(st.permutations([stream for stream, steps in log.items() for _ in steps]))
    streams = {stream: iter(steps) for stream, steps in log.items()}
    return [(stream, next(streams[stream])) for stream in turns]


@st.composite
def logs_with_erasure(draw: st.DrawFn) -> dict[str, list[Step]]:
    """A log in which one user asks to be forgotten: an erasure in every stream, all of one time, anywhere in each."""
    log: dict[str, list[Step]] = {name: list(events) for name, events in draw(strategies.logs()).items()}
    erasure = Erasure(draw(strategies.users), draw(strategies.moments))
    for steps in log.values():
        steps.insert(draw(st.integers(0, len(steps))), erasure)
    return log


def click(number: int, *, item: str = "i0", at_ms: int = 0, action: str = "click", user: UserId = U1) -> Click:
    return Click(
        event_id=EventId(f"c{number}"),
        user_id=user,
        item_id=ItemId(item),
        occurred_at=at_ms,
        action=action,  # type: ignore[arg-type]  # the tests' tables give plain strings
    )


def impression(number: int, items: Iterable[str], *, at_ms: int = 0) -> Impression:
    shown = [Ranked(item_id=ItemId(item), text="", features="", score=0.0, source="test") for item in items]
    return Impression(
        event_id=EventId(f"m{number}"),
        user_id=U1,
        occurred_at=at_ms,
        request_id=RequestId(f"m{number}"),
        model_version=ModelVersion("v0"),
        feature_names_hash="none",
        user_text="",
        shown=shown,
    )


@settings(max_examples=400, deadline=None)
@given(st.data(), strategies.logs())
def test_interleaving_of_the_streams_never_changes_a_stored_byte(
    data: st.DataObject, log: dict[str, list[UserEvent]]
) -> None:
    one = folded(data.draw(interleavings(log)))
    other = folded(data.draw(interleavings(log)))
    assert one.stored() == other.stored()


@settings(max_examples=400, deadline=None)
@given(st.data(), logs_with_erasure())
def test_interleaving_never_changes_a_stored_byte_when_a_user_is_forgotten(
    data: st.DataObject, log: dict[str, list[Step]]
) -> None:
    one = folded(data.draw(interleavings(log)))
    other = folded(data.draw(interleavings(log)))
    assert one.stored() == other.stored()


@pytest.mark.parametrize("seed", range(10))  # every other one with an erasure
def test_interleaving_never_changes_a_stored_byte_when_every_bound_is_passed(seed: int) -> None:
    random = Random(seed)
    log: dict[str, list[Step]] = {"clicks": [], "ratings": [], "impressions": [], "contexts": []}
    for number in range(700):
        at_ms = random.randrange(60 * DAY_MS)
        item = f"i{random.randrange(650)}" if number % 3 else f"i{random.randrange(6)}"
        log["clicks"].append(click(number, item=item, at_ms=at_ms, action=random.choice(["click", "view", "skip"])))
        log["impressions"].append(impression(number, [item, f"i{number}"], at_ms=at_ms))
        log["ratings"].append(
            Rating(
                event_id=EventId(f"r{number}"),
                user_id=U1,
                item_id=ItemId(item),
                occurred_at=random.randrange(60 * DAY_MS),
                value=random.choice([1.0, 3.0, 5.0]),
                review="fine" if number % 5 == 0 else None,
            )
        )
    if seed % 2:
        for steps in log.values():
            steps.insert(random.randrange(len(steps) + 1), Erasure(U1, 30 * DAY_MS))
    turns = [stream for stream, steps in log.items() for _ in steps]
    stored = []
    for _ in range(2):
        random.shuffle(turns)
        streams = {stream: iter(steps) for stream, steps in log.items()}
        state = State()
        for count, stream in enumerate(turns):
            state.fold(stream, next(streams[stream]))
            if count % random.randrange(100, 400) == 0:
                state = state.reloaded()
        stored.append(state.stored())
    assert stored[0] == stored[1]


@settings(max_examples=200, deadline=None)
@given(st.data(), logs_with_erasure())
def test_storing_and_loading_at_any_moment_never_changes_a_later_byte(
    data: st.DataObject, log: dict[str, list[Step]]
) -> None:
    steps = in_order(log)
    crash_at = data.draw(st.sets(st.integers(0, len(steps))))
    state = State()
    for number, (stream, step) in enumerate(steps):
        if number in crash_at:
            state = state.reloaded()
        state.fold(stream, step)
    assert state.stored() == folded(steps).stored()


@settings(max_examples=200, deadline=None)
@given(st.data(), strategies.logs(max_size=15))
def test_a_repeated_event_changes_no_stored_byte(data: st.DataObject, log: dict[str, list[UserEvent]]) -> None:
    steps = data.draw(interleavings(log))
    state = State()
    for number, (stream, step) in enumerate(steps):
        state.fold(stream, step)
        before = state.stored()
        again_stream, again = steps[data.draw(st.integers(0, number))]
        assert state.fold(again_stream, again) is Outcome.REPEATED
        assert state.stored() == before


def test_the_same_event_id_in_two_streams_is_two_events() -> None:
    rating = Rating(event_id=EventId("c1"), user_id=U1, item_id=ItemId("i0"), occurred_at=0, value=4)
    state = folded([("clicks", click(1)), ("ratings", rating)])
    assert state.profiles[U1].events == 2


def test_a_repeat_beyond_the_window_of_ids_is_counted_again() -> None:
    steps = [("clicks", click(number)) for number in range(MAX_EVENT_IDS + 1)]
    state = folded(steps)
    assert state.fold("clicks", click(1)) is Outcome.REPEATED
    assert state.fold("clicks", click(0)) is Outcome.APPLIED


@given(st.data(), strategies.logs())
def test_touches_lie_in_time_order_however_late_they_come(data: st.DataObject, log: dict[str, list[UserEvent]]) -> None:
    state = folded(data.draw(interleavings(log)))
    for profile in state.profiles.values():
        assert profile.recent == sorted(profile.recent)
    for counters in state.counters.items.values():
        assert counters.touches_ms == sorted(counters.touches_ms)


def test_a_touch_older_than_the_hundred_newest_falls_out() -> None:
    state = folded([("clicks", click(number, at_ms=1000 + number)) for number in range(MAX_RECENT)])
    state.fold("clicks", click(999, at_ms=5))
    touches = state.profiles[U1].recent
    assert [touch.at_ms for touch in touches] == list(range(1000, 1000 + MAX_RECENT))
    assert state.profiles[U1].first_at_ms == 5


@settings(max_examples=10, deadline=None)
@given(st.permutations(range(900)))
def test_a_profile_and_its_counters_stay_within_their_bounds(order: list[int]) -> None:
    state = State()
    for number in order:
        at_ms = number * 60_000
        item = Item(item_id=ItemId(f"x{number}"), title="x", tags=[f"tag{number}", f"also{number}"])
        profile = state.profiles.setdefault(U1, Profile(U1))
        fold_event(click(number, item=item.item_id, at_ms=at_ms, action="like"), profile, state.counters, item)
        fold_event(click(10_000 + number, item="hub", at_ms=at_ms), profile, state.counters, None)
        rating = Rating(
            event_id=EventId(f"r{number}"),
            user_id=U1,
            item_id=item.item_id,
            occurred_at=at_ms,
            value=5,
            review="a" * 9000,
        )
        fold_event(rating, profile, state.counters, item)
        for strand in profile.strands:
            assert len(strand.event_ids) <= MAX_EVENT_IDS
            assert len(strand.seen) <= MAX_SEEN
            assert len(strand.interests) <= MAX_INTERESTS
            assert len(strand.last_items) <= MAX_LAST_ITEMS
        assert len(profile.recent) <= MAX_RECENT
        assert len(profile.reviews) <= MAX_REVIEWS
        assert all(len(review.text) <= MAX_REVIEW_CHARS for review in profile.reviews)
    assert len(profile.recent) == MAX_RECENT
    assert max(len(held.covisits) for held in state.counters.items.values()) <= MAX_COVISITS
    assert len(state.counters.items[ItemId("hub")].touches_ms) == MAX_TOUCHES
    assert len(encode_profile(profile)) < 64_000


@settings(max_examples=200, deadline=None)
@given(st.lists(strategies.clicks, max_size=40))
def test_counters_equal_the_closed_formula(events: list[Click]) -> None:
    events = list({(event.user_id, event.event_id): event for event in reversed(events)}.values())
    state = folded([("clicks", event) for event in events])
    for item_id, counters in state.counters.items.items():
        of_item = [event for event in events if event.item_id == item_id]
        times_by_kind = {
            "clicked": [event.at_ms for event in of_item if event.action not in {"skip", "hide"}],
            "skipped": [event.at_ms for event in of_item if event.action in {"skip", "hide"}],
            "liked": [event.at_ms for event in of_item if event.action in {"like", "save", "share", "purchase"}],
        }
        for kind, times in times_by_kind.items():
            held = counters.sums.get(kind)
            if not times:
                assert held is None
                continue
            assert held is not None
            assert held.at_ms == max(times)
            assert held.count == len(times)
            for half_life_s, total in zip(HALF_LIVES_S, held.sums, strict=True):
                exact = sum(exp2((at_ms - held.at_ms) / (half_life_s * 1000)) for at_ms in times)
                assert total == pytest.approx(exact, rel=1e-9)


@settings(max_examples=200, deadline=None)
@given(st.data(), st.lists(strategies.clicks, max_size=20, unique_by=lambda event: (event.user_id, event.event_id)))
def test_order_of_times_within_a_stream_changes_only_rounding(data: st.DataObject, events: list[Click]) -> None:
    one = folded([("clicks", event) for event in events])
    other = folded([("clicks", event) for event in data.draw(st.permutations(events))])
    for user_id, profile in one.profiles.items():
        twin = other.profiles[user_id]
        assert (profile.recent, profile.events) == (twin.recent, twin.events)
        assert (profile.first_at_ms, profile.last_at_ms) == (twin.first_at_ms, twin.last_at_ms)
        assert profile.clicks.seen == twin.clicks.seen
        assert profile.clicks.counts == twin.clicks.counts
        assert profile.clicks.dwell_s == pytest.approx(twin.clicks.dwell_s, rel=1e-9)
        assert profile.clicks.interests.keys() == twin.clicks.interests.keys()
        for key, (at_ms, weight) in profile.clicks.interests.items():
            assert twin.clicks.interests[key][0] == at_ms
            assert twin.clicks.interests[key][1] == pytest.approx(weight, rel=1e-9, abs=1e-9)
    for item_id, counters in one.counters.items.items():
        twin_counters = other.counters.items[item_id]
        assert counters.touches_ms == twin_counters.touches_ms
        for kind in ("clicked", "liked", "skipped"):
            if kind in counters.sums:
                assert twin_counters.sums[kind].count == counters.sums[kind].count
                assert twin_counters.sums[kind].sums == pytest.approx(counters.sums[kind].sums, rel=1e-9)


def test_an_interest_halves_in_fourteen_days() -> None:
    first, second = click(1, item="i4", at_ms=0), click(2, item="i4", at_ms=int(INTEREST_HALF_LIFE_MS))
    profile = folded([("clicks", first), ("clicks", second)]).profiles[U1]
    held_ms, weight = profile.clicks.interests["tag:tag4"]
    assert held_ms == int(INTEREST_HALF_LIFE_MS)
    assert weight == pytest.approx(1.5)


@settings(max_examples=200, deadline=None)
@given(st.data(), strategies.logs(), strategies.moments)
def test_a_forgotten_user_stays_forgotten_when_the_log_is_read_again(
    data: st.DataObject, log: dict[str, list[UserEvent]], at_ms: int
) -> None:
    state = folded(in_order(log))
    for user_id in USERS:
        for stream in STREAMS:
            state.fold(stream, Erasure(user_id, at_ms))
    forgotten = state.stored()
    for name, event in data.draw(interleavings(log)):
        if event.at_ms <= at_ms:
            assert state.fold(name, event) is Outcome.FORGOTTEN
    assert state.stored() == forgotten


def test_forgetting_leaves_nothing_of_what_came_before() -> None:
    full = folded([("clicks", click(1, at_ms=5)), ("clicks", click(2, at_ms=9))])
    full.fold(
        "ratings", Rating(event_id=EventId("r"), user_id=U1, item_id=ItemId("i0"), occurred_at=7, value=5, review="x")
    )
    for stream in STREAMS:
        full.fold(stream, Erasure(U1, 9))
    never = State({U1: Profile(U1)})
    for stream in STREAMS:
        never.fold(stream, Erasure(U1, 9))
    assert encode_profile(full.profiles[U1]) == encode_profile(never.profiles[U1])


def test_an_older_erasure_read_again_does_not_shorten_the_forgetting() -> None:
    profile = fold_erasure(fold_erasure(Profile(U1), 100), 50)
    assert {strand.forgotten_before_ms for strand in profile.strands} == {100}


def test_what_happens_after_an_erasure_is_learnt() -> None:
    state = State({U1: fold_erasure(Profile(U1), 100)})
    assert state.fold("clicks", click(1, at_ms=100)) is Outcome.FORGOTTEN
    assert state.fold("clicks", click(2, at_ms=101)) is Outcome.APPLIED
    assert [touch.at_ms for touch in state.profiles[U1].recent] == [101]


def test_only_a_users_first_touch_counts_as_a_distinct_user() -> None:
    state = folded([("clicks", click(number, at_ms=number)) for number in range(3)])
    state.fold("clicks", click(9, at_ms=9, user=UserId("u2")))
    sums = state.counters.items[ItemId("i0")].sums
    assert (sums["users"].count, sums["clicked"].count) == (2, 4)


@pytest.mark.parametrize("action", ["skip", "hide"])
def test_who_clicks_after_a_skip_or_a_hide_is_a_distinct_user_from_the_click_on(action: str) -> None:
    state = folded([("clicks", click(1, at_ms=1, action=action))])
    assert "users" not in state.counters.items[ItemId("i0")].sums
    for number in (2, 3):
        state.fold("clicks", click(number, at_ms=number))
    state.fold("clicks", click(4, at_ms=4, action=action))
    state.fold("clicks", click(5, at_ms=5))
    users = state.counters.items[ItemId("i0")].sums["users"]
    assert (users.at_ms, users.count) == (2, 1)


def test_items_touched_one_after_the_other_are_covisited_both_ways() -> None:
    state = folded([("clicks", click(1, item="i0")), ("clicks", click(2, item="i1", at_ms=5))])
    assert state.counters.items[ItemId("i0")].covisits == {ItemId("i1"): (5, 1.0)}
    assert state.counters.items[ItemId("i1")].covisits == {ItemId("i0"): (5, 1.0)}


@settings(max_examples=100, deadline=None)
@given(strategies.logs())
def test_stored_profiles_and_counters_read_back_as_they_were(log: dict[str, list[UserEvent]]) -> None:
    state = folded(in_order(log))
    assert state.reloaded().stored() == state.stored()
    for user_id, profile in state.reloaded().profiles.items():
        assert profile.recent == state.profiles[user_id].recent
        assert profile.strands == state.profiles[user_id].strands
