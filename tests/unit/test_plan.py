"""The supervisor's decisions: pure, so every one is a line."""

from hypothesis import given
from hypothesis import strategies as st

from stream.fleet import Member
from stream.plan import StallWatch, plan_workers
from stream.progress import Progress
from tailrace.settings import StreamSettings

SETTINGS = StreamSettings(min_workers=1, max_workers=4, lag_per_worker=1000)


def lag(total: int, partitions: int = 8) -> dict[int, int]:
    """Spreads `total` records over the partitions."""
    return {number: total // partitions + (number < total % partitions) for number in range(partitions)}


assignments = st.lists(st.integers(0, 5), min_size=8, max_size=8).map(
    lambda owners: {owner: tuple(p for p in range(8) if owners[p] == owner) for owner in set(owners)}
)


@given(assignments, st.integers(0, 20_000))
def test_every_partition_has_one_owner_and_shares_differ_by_one_at_most(
    current: dict[int, tuple[int, ...]], total: int
) -> None:
    plan = plan_workers(lag(total), current, SETTINGS)
    assert sorted(partition for owned in plan.values() for partition in owned) == list(range(8))
    sizes = [len(owned) for owned in plan.values()]
    assert max(sizes) - min(sizes) <= 1
    assert 1 <= len(plan) <= 4


@given(assignments, st.integers(0, 20_000))
def test_a_plan_carried_out_is_not_changed_again(current: dict[int, tuple[int, ...]], total: int) -> None:
    plan = current
    for _ in range(8):  # fewer workers come one at a time
        plan = dict(plan_workers(lag(total), plan, SETTINGS))
    assert plan_workers(lag(total), plan, SETTINGS) == plan


def test_lag_brings_workers_at_once_and_a_new_one_takes_only_its_share() -> None:
    current = {0: tuple(range(8))}
    plan = plan_workers(lag(1500), current, SETTINGS)
    assert plan == {0: (0, 1, 2, 3), 1: (4, 5, 6, 7)}


def test_workers_leave_only_when_half_of_what_the_rest_can_do_is_left() -> None:
    current = {0: (0, 1, 2, 3), 1: (4, 5, 6, 7)}
    assert len(plan_workers(lag(900), current, SETTINGS)) == 2
    assert plan_workers(lag(500), current, SETTINGS) == {0: tuple(range(8))}


def test_never_more_workers_than_partitions() -> None:
    assert plan_workers({0: 10**6}, {}, SETTINGS) == {0: (0,)}


def test_worker_without_lag_never_stalls() -> None:
    watch = StallWatch(30)
    assert not any(watch.has_stalled(0, 0, "here", now_s) for now_s in (0.0, 100.0, 200.0))


def test_worker_with_lag_stalls_after_the_time_and_not_before() -> None:
    watch = StallWatch(30)
    assert [watch.has_stalled(0, 5, "here", now_s) for now_s in (0.0, 30.0, 31.0)] == [False, False, True]


def test_progress_starts_the_time_anew_and_silence_does_not() -> None:
    watch = StallWatch(30)
    watch.has_stalled(0, 5, "here", 0.0)
    assert not watch.has_stalled(0, 5, "there", 29.0)
    assert not watch.has_stalled(0, 5, None, 58.0)
    assert watch.has_stalled(0, 5, None, 60.0)


def test_worker_that_has_not_answered_yet_is_given_a_minute() -> None:
    watch = StallWatch(30)
    assert [watch.has_stalled(0, 5, None, now_s) for now_s in (0.0, 59.0, 61.0)] == [False, False, True]


def test_worker_that_lost_a_partition_is_judged_by_that_one_alone() -> None:
    watch, member = StallWatch(30), Member((0, 1), handle=None, answered=True)
    stalled = []
    for now_s in (0.0, 20.0, 40.0):  # it goes on with partition 0, and can never go on with partition 1
        offsets = {0: {"clicks": int(now_s)}}
        member.progress = Progress(pid=1, partitions=(0,), fenced=(1,), next_offsets=offsets)
        to_do, reached = member.work({0: 0, 1: 7})
        stalled.append(watch.has_stalled(0, to_do, reached, now_s))
    assert stalled == [False, False, True]
    assert member.work({0: 9, 1: 0}) == (0, (1,))
