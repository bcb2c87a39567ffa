"""The pace of a replay, and the order of its records. Nothing here needs a broker."""

from collections.abc import Iterator
from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tailrace.events import Click
from tailrace.ids import EventId, ItemId, UserId
from tailrace.importers import Dataset, Row
from tailrace.items import Item
from tailrace.replay import Pace, in_event_time

TIMES = st.integers(0, 10**13)
SPEEDS = st.floats(0.01, 1e6)


class FakeClock:
    """A clock that moves only when told to."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


@given(first_ms=TIMES, gap_ms=st.integers(0, 10**12), speed=SPEEDS)
def test_a_gap_takes_its_own_length_divided_by_the_speed(first_ms: int, gap_ms: int, speed: float) -> None:
    pace = Pace(first_ms, speed, FakeClock())
    assert pace.due_s(first_ms + gap_ms) == pytest.approx(gap_ms / 1000 / speed)


@given(first_ms=TIMES, times=st.lists(TIMES), speed=SPEEDS)
def test_later_events_are_never_due_before_earlier_ones(first_ms: int, times: list[int], speed: float) -> None:
    pace = Pace(first_ms, speed, FakeClock())
    due = [pace.due_s(at_ms) for at_ms in sorted(times)]
    assert due == sorted(due)
    assert all(one >= 0 for one in due)


@given(first_ms=TIMES, gap_ms=st.integers(0, 10**9), speed=SPEEDS, passed_s=st.floats(0, 1e6))
def test_waiting_as_long_as_told_ends_when_the_event_is_due(
    first_ms: int, gap_ms: int, speed: float, passed_s: float
) -> None:
    clock = FakeClock()
    pace = Pace(first_ms, speed, clock)
    clock.now_s += passed_s
    clock.now_s += max(pace.wait_s(first_ms + gap_ms), 0.0)
    assert clock.now_s - 1000.0 == pytest.approx(max(gap_ms / 1000 / speed, passed_s), abs=1e-6)


@given(first_ms=TIMES, at_ms=TIMES)
def test_at_full_speed_everything_is_due_at_once(first_ms: int, at_ms: int) -> None:
    assert Pace(first_ms, inf, FakeClock()).wait_s(at_ms) == 0


@pytest.mark.parametrize("speed", [0.0, -1.0, float("nan")])
def test_speed_must_be_above_zero(speed: float) -> None:
    with pytest.raises(ValueError, match="above 0"):
        Pace(0, speed, FakeClock())


@given(item_times=st.lists(st.integers(0, 9)).map(sorted), event_times=st.lists(st.integers(0, 9)).map(sorted))
def test_replay_is_in_time_order_and_an_item_comes_before_an_event_of_its_moment(
    item_times: list[int], event_times: list[int]
) -> None:
    items = [Row("items", str(at_ms), Item(item_id=ItemId(str(at_ms)), title="t"), at_ms) for at_ms in item_times]

    def events() -> Iterator[Row]:
        for number, at_ms in enumerate(event_times):
            click = Click(event_id=EventId(str(number)), user_id=UserId("u"), item_id=ItemId("i"), occurred_at=at_ms)
            yield Row("clicks", "u", click, at_ms)

    rows = list(in_event_time(Dataset(items, events(), 0, 9)))
    assert len(rows) == len(item_times) + len(event_times)
    order = [(row.at_ms, row.role != "items") for row in rows]
    assert order == sorted(order)
