"""The parts of a profile, each on its own."""

import pytest

from tailrace.events import Context
from tailrace.ids import EventId, ItemId, UserId
from tailrace.profile import (
    INTEREST_HALF_LIFE_MS,
    MAX_EVENT_IDS,
    MAX_INTERESTS,
    MAX_RECENT,
    MAX_SEEN,
    Profile,
    Strand,
    Touch,
    apply_interest,
    apply_seen,
    apply_touch,
    current_context,
    decode_profile,
    encode_profile,
    interest,
    is_repeat,
)

U1 = UserId("u1")


def touch(at_ms: int, item: str = "i") -> Touch:
    return Touch(at_ms, ItemId(item), "click")


def test_an_event_id_is_a_repeat_within_the_newest_64() -> None:
    strand = Strand()
    ids = [EventId(f"e{number}") for number in range(MAX_EVENT_IDS)]
    assert not any(is_repeat(strand, event_id) for event_id in ids)
    assert is_repeat(strand, ids[0])
    assert not is_repeat(strand, EventId("one more"))
    assert not is_repeat(strand, ids[0])
    assert len(strand.event_ids) == MAX_EVENT_IDS


def test_late_touches_land_in_time_order_and_equal_times_in_item_order() -> None:
    profile = Profile(U1)
    for one in (touch(3), touch(1), touch(2, "b"), touch(2, "a"), touch(9)):
        apply_touch(profile, one)
    assert [(one.at_ms, one.item_id) for one in profile.recent] == [(1, "i"), (2, "a"), (2, "b"), (3, "i"), (9, "i")]


def test_the_hundred_newest_touches_are_kept_in_whatever_order_they_come() -> None:
    profile = Profile(U1)
    for number in range(300):
        apply_touch(profile, touch((number * 7) % 300))
    assert [one.at_ms for one in profile.recent] == list(range(300 - MAX_RECENT, 300))


def test_seen_says_whether_a_touch_is_the_first_and_forgets_the_oldest_eighth() -> None:
    strand = Strand()
    assert apply_seen(strand, ItemId("i0"), 0)
    assert not apply_seen(strand, ItemId("i0"), 5)
    assert not apply_seen(strand, ItemId("i0"), 2)
    assert strand.seen == {ItemId("i0"): (5, 3)}
    for number in range(1, MAX_SEEN + 1):
        apply_seen(strand, ItemId(f"i{number}"), 10 + number)
    assert len(strand.seen) == MAX_SEEN + 1 - MAX_SEEN // 8
    assert apply_seen(strand, ItemId("i0"), 9999)
    assert not apply_seen(strand, ItemId(f"i{MAX_SEEN}"), 9999)


def test_of_too_many_interests_the_strongest_stay() -> None:
    strand = Strand()
    apply_interest(strand, ["strong", "disliked"], 0, 5.0)
    apply_interest(strand, ["disliked"], 0, -12.0)
    for number in range(MAX_INTERESTS - 1):
        apply_interest(strand, [f"tag{number}"], 0, 1.0)
    assert len(strand.interests) == MAX_INTERESTS * 2 // 3
    assert {"strong", "disliked"} <= strand.interests.keys()


def test_a_late_interest_is_decayed_to_the_time_that_is_held() -> None:
    half_life = int(INTEREST_HALF_LIFE_MS)
    in_order, late = Strand(), Strand()
    for strand, times in ((in_order, (0, half_life)), (late, (half_life, 0))):
        for at_ms in times:
            apply_interest(strand, ["tag"], at_ms, 1.0)
    assert in_order.interests["tag"] == late.interests["tag"] == (half_life, 1.5)
    assert interest((0, 4.0), 2 * half_life) == pytest.approx(1.0)
    assert interest((10, 4.0), 0) == 4.0


def test_a_context_holds_until_its_time_is_over() -> None:
    context = Context(event_id=EventId("e"), user_id=U1, occurred_at=1000, ttl_s=2.0)
    profile = Profile(U1, context=context)
    assert current_context(profile, 3000) is context
    assert current_context(profile, 3001) is None
    assert current_context(Profile(U1), 0) is None


def test_an_empty_profile_has_no_times_and_no_events() -> None:
    profile = Profile(U1)
    assert (profile.events, profile.first_at_ms, profile.last_at_ms) == (0, None, None)


def test_two_new_profiles_share_nothing() -> None:
    one, other = Profile(U1), Profile(UserId("u2"))
    apply_touch(one, touch(1))
    apply_seen(one.clicks, ItemId("i"), 1)
    is_repeat(one.clicks, EventId("e"))
    assert other.recent == []
    assert other.clicks == one.ratings == Strand()


def test_a_profile_reads_back_as_it_was_stored() -> None:
    profile = Profile(U1, context=Context(event_id=EventId("e"), user_id=U1, occurred_at=7, attributes={"a": 1.5}))
    apply_touch(profile, touch(1, "名"))
    apply_seen(profile.clicks, ItemId("名"), 1)
    apply_interest(profile.clicks, ["tag:é"], 1, 0.1)
    assert decode_profile(encode_profile(profile)) == profile
