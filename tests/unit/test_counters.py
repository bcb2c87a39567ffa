"""Item counters: decayed sums, touches and co-visits."""

from math import exp2

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tailrace.counters import (
    HALF_LIVES_S,
    KINDS,
    MAX_COVISITS,
    MAX_TOUCHES,
    MAX_VISITORS,
    VISITOR_BUCKETS,
    CounterTable,
    ItemCounters,
    add_decayed,
    apply_count,
    apply_covisit,
    apply_touch,
    apply_visitor,
    decayed,
    decode_counters,
    encode_counters,
    item_stats,
    visitor_bucket,
)
from tailrace.events import DecayedSum, ItemStats, decode, encode
from tailrace.ids import ItemId, UserId

DAY_MS = 86_400_000
times = st.lists(st.integers(0, 60 * DAY_MS), min_size=1, max_size=30)


def counted(all_times: list[int], kind: str = "clicked") -> DecayedSum:
    counters = ItemCounters()
    for at_ms in all_times:
        apply_count(counters, kind, at_ms)
    return counters.sums[kind]


@given(times)
def test_decayed_sums_equal_the_closed_formula_in_any_order(all_times: list[int]) -> None:
    held = counted(all_times)
    assert held.at_ms == max(all_times)
    assert held.count == len(all_times)
    for half_life_s, total in zip(HALF_LIVES_S, held.sums, strict=True):
        assert total == pytest.approx(sum(exp2((t - held.at_ms) / 1000 / half_life_s) for t in all_times), rel=1e-9)


@given(times, st.data())
def test_shares_of_partitions_add_up_to_the_whole(all_times: list[int], data: st.DataObject) -> None:
    cut = data.draw(st.integers(0, len(all_times)))
    shares = [counted(part) for part in (all_times[:cut], all_times[cut:]) if part]
    whole, added = counted(all_times), add_decayed(shares)
    assert (added.at_ms, added.count) == (whole.at_ms, whole.count)
    assert added.sums == pytest.approx(whole.sums, rel=1e-9)


@given(st.permutations(KINDS))
def test_kinds_are_stored_in_one_order_whichever_came_first(kinds: list[str]) -> None:
    counters = ItemCounters()
    for kind in kinds:
        apply_count(counters, kind, 0)
    assert tuple(counters.sums) == KINDS


@given(times)
def test_the_eight_newest_touches_and_the_first_are_kept(all_times: list[int]) -> None:
    counters = ItemCounters()
    for at_ms in all_times:
        apply_touch(counters, at_ms)
    assert counters.touches_ms == sorted(all_times)[-MAX_TOUCHES:]
    assert counters.first_ms == min(all_times)


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(0, 30 * DAY_MS)), max_size=80))
def test_covisits_stay_within_their_bound_and_never_undercount_what_stays(pairs: list[tuple[int, int]]) -> None:
    counters = ItemCounters()
    exact: dict[ItemId, list[int]] = {}
    for number, at_ms in pairs:
        other = ItemId(f"i{number}")
        apply_covisit(counters, other, at_ms)
        exact.setdefault(other, []).append(at_ms)
        assert len(counters.covisits) <= MAX_COVISITS
    if len(exact) <= MAX_COVISITS:
        for other, all_times in exact.items():
            held_ms, weight = counters.covisits[other]
            assert held_ms == max(all_times)
            expected = sum(exp2((at_ms - held_ms) / (7 * DAY_MS)) for at_ms in all_times)
            assert weight == pytest.approx(expected, rel=1e-9)


def test_of_too_many_covisits_the_stronger_half_stays() -> None:
    counters = ItemCounters()
    for number in range(MAX_COVISITS):
        for _ in range(1 + number % 2):
            apply_covisit(counters, ItemId(f"i{number}"), 0)
    apply_covisit(counters, ItemId("one too many"), 0)
    assert counters.covisits == {ItemId(f"i{number}"): (0, 2.0) for number in range(1, MAX_COVISITS, 2)}


@given(times)
def test_the_newest_visitors_are_kept_in_time_order_whatever_the_order_of_arrival(at_ms: list[int]) -> None:
    counters = ItemCounters()
    for number, moment in enumerate(at_ms * 2):
        apply_visitor(counters, number, moment)
    assert counters.visitors == sorted((moment, number) for number, moment in enumerate(at_ms * 2))[-MAX_VISITORS:]


def test_a_visitor_bucket_names_no_user_of_many() -> None:
    buckets = [visitor_bucket(UserId(f"u{number}")) for number in range(4 * VISITOR_BUCKETS)]
    assert set(buckets) <= set(range(VISITOR_BUCKETS))
    assert len(set(buckets)) > 0.9 * VISITOR_BUCKETS


def test_a_covisit_halves_in_seven_days() -> None:
    assert decayed((0, 8.0), 7 * DAY_MS) == pytest.approx(4.0)
    assert decayed((5, 8.0), 0) == 8.0


def test_touching_a_table_marks_the_item_as_changed() -> None:
    table = CounterTable()
    assert table.touch(ItemId("i")) is table.touch(ItemId("i"))
    assert table.dirty == {ItemId("i")}


def test_counters_read_back_as_they_were_stored_and_published() -> None:
    counters = ItemCounters()
    for kind in KINDS:
        apply_count(counters, kind, 5)
    apply_touch(counters, 5)
    apply_covisit(counters, ItemId("other"), 5)
    apply_visitor(counters, visitor_bucket(UserId("u")), 5)
    assert decode_counters(encode_counters(counters)) == counters
    published = item_stats(ItemId("i"), 3, counters)
    assert decode(msgspec.json.Decoder(ItemStats), encode(published)) == published
