"""The join and the selection: rules by name, and what holds whatever the log says and in whatever order."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from random import Random
from typing import Any, TypeVar

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tailrace.events import ACTIONS, Action, Click, Impression, Ranked, Rating, encode
from tailrace.features import FEATURE_NAMES, FEATURE_NAMES_HASH, encode_features
from tailrace.ids import EventId, ItemId, ModelVersion, RequestId, UserId
from tailrace.settings import TrainingSettings
from tailrace.tastes import Tastes, bucket
from training.attribution import hash_ids
from training.examples import Example, JoinCounts, Joined, join
from training.log_window import AlreadyRead, Chunk, LogWindow, decode_chunk, read_partition
from training.reservoir import Selection
from training.round_state import split_by_time

SETTINGS = TrainingSettings(wait_s=5, attribution_s=20)
CUTOFF_MS = 80_000
DAY_MS = 86_400_000
USERS, ITEMS = ("u0", "u1"), ("i0", "i1", "i2", "i3")


def candidate(item: str, position: int | None) -> Ranked:
    return Ranked(
        item_id=ItemId(item),
        text=f"about {item}",
        features=encode_features(np.full(len(FEATURE_NAMES), ITEMS.index(item), dtype=np.float32)),
        score=float(ITEMS.index(item)),
        source="test",
        position=position,
        propensity=None if position is None else 0.5,
        tags=[f"tag of {item}"],
    )


def impression(
    request: str = "r", at_s: float = 10, shown: str = "01", unshown: str = "2", user: str = "u0", **other: Any
) -> Impression:
    made = Impression(
        event_id=EventId(request),
        request_id=RequestId(request),
        user_id=UserId(user),
        occurred_at=round(at_s * 1000),
        model_version=ModelVersion("v7"),
        feature_names_hash=FEATURE_NAMES_HASH,
        user_text="likes tests",
        shown=[candidate(f"i{number}", position) for position, number in enumerate(shown)],
        unshown=[candidate(f"i{number}", None) for number in unshown],
        answers={"tag of i1": (0.5, 1.0)},
    )
    return msgspec.structs.replace(made, **other)


def with_first(request: str, **other: Any) -> Impression:
    """Returns an impression whose first shown candidate is changed."""
    made = impression(request)
    return msgspec.structs.replace(made, shown=[msgspec.structs.replace(made.shown[0], **other), *made.shown[1:]])


@dataclass
class Numbers:
    """Gives every event an id of its own."""

    last: int = 0

    def __call__(self) -> EventId:
        self.last += 1
        return EventId(f"e{self.last}")


new_id = Numbers()


def click(
    item: str = "i0",
    at_s: float = 12,
    request: str | None = "r",
    action: Action = "click",
    dwell_s: float | None = None,
    user: str = "u0",
    event: str | None = None,
) -> Click:
    return Click(
        event_id=EventId(event) if event else new_id(),
        user_id=UserId(user),
        item_id=ItemId(item),
        occurred_at=round(at_s * 1000),
        request_id=None if request is None else RequestId(request),
        action=action,
        dwell_s=dwell_s,
    )


def rating(
    value: float,
    at_s: float = 12,
    request: str | None = "r",
    user: str = "u0",
    scale: tuple[float, float] = (1, 5),
    event: str | None = None,
) -> Rating:
    return Rating(
        event_id=EventId(event) if event else new_id(),
        user_id=UserId(user),
        item_id=ItemId("i0"),
        occurred_at=round(at_s * 1000),
        request_id=None if request is None else RequestId(request),
        value=value,
        scale_min=scale[0],
        scale_max=scale[1],
    )


def joined(
    impressions: Sequence[Impression],
    *feedback: Click | Rating,
    erasures: dict[UserId, int] | None = None,
    settings: TrainingSettings = SETTINGS,
) -> Joined:
    clicks = [one for one in feedback if isinstance(one, Click)]
    ratings = [one for one in feedback if isinstance(one, Rating)]
    return join(impressions, clicks, ratings, erasures or {}, cutoff_ms=CUTOFF_MS, settings=settings)


def only(made: Joined) -> Example:
    assert len(made.examples) == 1
    return made.examples[0]


# Rules


def test_example_carries_what_was_ranked_first_the_slate_then_the_sample_of_the_others() -> None:
    example = only(joined([impression(shown="31", unshown="02")]))
    assert example.item_ids == ("i3", "i1", "i0", "i2")
    assert example.texts == ("about i3", "about i1", "about i0", "about i2")
    assert (example.num_shown, example.model_version, example.user_text) == (2, "v7", "likes tests")
    assert example.features_NF.shape == (4, len(FEATURE_NAMES))
    assert example.features_NF[:, 5].tolist() == example.scores_N.tolist() == [3, 1, 0, 2]
    assert example.tastes.tags_NK[:, 0].tolist() == [bucket(f"tag of i{number}") for number in (3, 1, 0, 2)]
    assert example.tastes.answers.met_E.tolist() == [bucket("tag of i1")]
    assert example.propensities_N.tolist()[:2] == [0.5, 0.5]
    assert np.isnan(example.propensities_N[2:]).all()
    assert example.gains_N.tolist() == [0, 0, 0, 0]
    assert not example.clicked_N.any()
    assert np.isnan(example.ratings_N).all()
    floats = (example.features_NF, example.scores_N, example.propensities_N, example.gains_N, example.ratings_N)
    assert {array.dtype for array in floats} == {np.dtype("float32")}


@pytest.mark.parametrize("action", ACTIONS)
def test_gain_of_an_action_is_its_setting_and_never_below_zero(action: Action) -> None:
    gain = getattr(SETTINGS, f"{action}_gain")
    example = only(joined([impression()], click(action=action)))
    assert example.gains_N.tolist() == [pytest.approx(max(gain, 0)), 0, 0]
    assert example.clicked_N.tolist() == [gain > 0, False, False]


def test_actions_on_one_item_add_up() -> None:
    example = only(joined([impression()], click(), click(action="like"), click("i1", action="view")))
    assert example.gains_N.tolist() == [3, pytest.approx(0.3), 0]


@pytest.mark.parametrize(
    ("dwell_s", "bonus"), [(None, 0), (5, 0), (10, 0), (20, 0.25), (40, 0.5), (80, 0.75), (9000, 0.75)]
)
def test_dwell_adds_per_doubling_above_ten_seconds_three_at_most(dwell_s: float | None, bonus: float) -> None:
    assert only(joined([impression()], click(dwell_s=dwell_s))).gains_N[0] == pytest.approx(1 + bonus)


def test_dwell_counts_once_the_longest_and_not_on_what_was_disliked() -> None:
    example = only(joined([impression()], click(dwell_s=20), click(action="like", dwell_s=40)))
    assert example.gains_N[0] == pytest.approx(1 + 2 + 0.5)
    assert only(joined([impression()], click(), click(action="skip", dwell_s=80))).gains_N[0] == 0


def test_skip_after_click_takes_the_gain_away_and_the_click_stays_a_click() -> None:
    example = only(joined([impression()], click(), click(action="skip", at_s=13)))
    assert (example.gains_N[0], example.clicked_N[0]) == (0, True)
    hidden = only(joined([impression()], click(), click(action="hide", at_s=13)))
    assert (hidden.gains_N[0], hidden.clicked_N[0]) == (0, True)


@pytest.mark.parametrize(
    ("value", "low", "high", "stars"), [(5, 1, 5, 5), (2, 1, 5, 2), (10, 0, 10, 5), (0, -1, 1, 3), (0.5, 0.5, 5, 1)]
)
def test_rating_is_rescaled_from_its_stated_scale_and_gains_above_the_middle(
    value: float, low: float, high: float, stars: float
) -> None:
    example = only(joined([impression()], rating(value, scale=(low, high))))
    assert example.ratings_N[0] == pytest.approx(stars)
    assert np.isnan(example.ratings_N[1:]).all()
    assert example.gains_N[0] == pytest.approx(max(stars - 3, 0))
    assert example.clicked_N[0] == (stars > 3)


def test_last_rating_of_an_item_counts() -> None:
    made = joined([impression()], rating(1, at_s=14), rating(5, at_s=12))
    assert only(made).ratings_N[0] == 1
    assert made.counts.repeated_actions == 1


def test_duplicate_clicks_count_once_per_action() -> None:
    made = joined([impression()], click(), click(at_s=13), click(at_s=14, request=None), click(action="like"))
    assert only(made).gains_N[0] == 3
    assert (made.counts.by_request, made.counts.by_item, made.counts.repeated_actions) == (3, 1, 2)


def test_event_sent_twice_counts_once() -> None:
    made = joined([impression()], click(event="same"), click(event="same", action="like"))
    assert made.counts.duplicate == 1
    assert made.counts.by_request == 1
    # Ids are a stream's own: a rating may have the id of a click.
    both = joined([impression()], click(event="same"), rating(5, event="same"))
    assert both.counts.by_request == 2


def test_label_that_comes_after_the_attribution_window_is_late_and_no_label() -> None:
    within = joined([impression()], click(at_s=30))
    assert only(within).clicked_N[0]
    late = joined([impression()], click(at_s=30.001))
    assert not only(late).clicked_N.any()
    assert (within.counts.late, late.counts.late) == (0, 1)


def test_click_of_a_slow_clock_joins_by_its_request() -> None:
    assert only(joined([impression()], click(at_s=9))).clicked_N[0]


def test_no_is_said_by_a_skip_a_hide_or_a_poor_rating_where_nothing_good_was_said() -> None:
    for no in (click(action="skip"), click(action="hide"), rating(1)):
        assert only(joined([impression()], no)).refused == (0,)
    assert only(joined([impression()], click(action="skip", at_s=13), click(at_s=12))).refused == ()
    assert only(joined([impression()], rating(3))).refused == ()


def test_example_says_how_long_after_it_was_shown_each_item_was_first_clicked() -> None:
    slow = only(
        joined([impression()], click(at_s=17), click(action="like", at_s=13), click(at_s=12), rating(1, at_s=11))
    )
    assert slow.delays_s == (2.0,)
    assert only(joined([impression()], click(action="skip", at_s=13))).delays_s == ()
    assert only(joined([impression()], click(at_s=9))).delays_s == (0.0,)  # a slow clock
    assert only(joined([impression()], click(at_s=14, request=None))).delays_s == (4.0,)


def test_click_without_request_joins_the_latest_slate_that_showed_the_item() -> None:
    slates = [impression("a", 10), impression("b", 15, shown="10"), impression("c", 16, shown="1", unshown="0")]
    made = joined(slates, click(at_s=18, request=None))
    assert [one.clicked_N.tolist() for one in made.examples] == [[False] * 3, [False, True, False], [False] * 2]
    assert made.counts.by_item == 1
    earlier = joined(slates, click(at_s=14, request=None))
    assert [one.clicked_N.any() for one in earlier.examples] == [True, False, False]


def test_click_without_request_outside_the_window_or_by_another_user_is_an_orphan() -> None:
    made = joined(
        [impression()],
        click(at_s=9.999, request=None),
        click(at_s=30.001, request=None),
        click(request=None, user="u1"),
        click("i2", request=None),
    )
    assert not only(made).clicked_N.any()
    assert made.counts.orphans == 4


def test_click_that_names_an_unknown_request_is_an_orphan_though_the_item_was_shown() -> None:
    made = joined([impression()], click(request="lost"), click(user="u1"))
    assert not only(made).clicked_N.any()
    assert made.counts.orphans == 2


def test_feedback_on_an_unshown_candidate_never_counts_for_the_slate() -> None:
    made = joined([impression()], click("i2"), click("i3"), click("i2", request=None))
    assert not only(made).clicked_N.any()
    assert only(made).gains_N.tolist() == [0, 0, 0]
    assert (made.counts.unshown, made.counts.orphans) == (2, 1)


def test_impression_waits_before_it_is_an_example_and_feedback_after_the_cutoff_is_the_next_rounds() -> None:
    made = joined([impression("old", 75), impression("new", 75.001)], click(at_s=81, request="old"))
    assert only(made).request_id == "old"
    assert not only(made).clicked_N.any()
    assert (made.counts.waiting, made.counts.early) == (1, 1)


def test_waiting_impression_takes_the_clicks_that_are_its() -> None:
    made = joined([impression("old", 60), impression("new", 76)], click(at_s=77, request=None))
    assert not only(made).clicked_N.any()
    assert made.counts.by_item == 1


def test_erased_user_leaves_no_example_from_before() -> None:
    slates = [impression("a", 10), impression("b", 40), impression("c", 10, user="u1")]
    made = joined(slates, click(request="a"), click(at_s=41, request="b"), erasures={UserId("u0"): 30_000})
    assert [one.request_id for one in made.examples] == ["b", "c"]
    assert made.examples[0].clicked_N[0]
    assert (made.counts.erased, made.counts.forgotten) == (1, 1)


def test_impression_that_was_ranked_on_a_profile_from_before_the_erasure_is_no_example() -> None:
    stale = impression(at_s=31, profile_age_ms=2000)
    made = joined([stale], click(at_s=32), click(at_s=32, request=None), erasures={UserId("u0"): 30_000})
    assert made.examples == []
    assert (made.counts.erased, made.counts.orphans) == (1, 2)


def test_retried_impression_is_one_example() -> None:
    made = joined([impression(), impression()], click(), click("i1", request=None))
    assert only(made).gains_N.tolist() == [1, 1, 0]
    assert (made.counts.impressions, made.counts.resent, made.counts.examples) == (1, 1, 1)


def test_what_cannot_be_learnt_from_is_counted_by_its_reason() -> None:
    short, endless = (encode_features(np.full(size, np.inf, dtype=np.float32)) for size in (3, len(FEATURE_NAMES)))
    made = joined(
        [
            with_first("imported", text=""),
            msgspec.structs.replace(with_first("popular", features=""), degraded="popular", feature_names_hash=""),
            impression("foreign", feature_names_hash="another"),
            with_first("short", features=short),
            msgspec.structs.replace(with_first("broken", features="@@@"), degraded="no_text"),
            with_first("endless", features=endless),
            impression("nothing", shown=""),
            impression("fine", degraded="no_text"),
        ],
        click(request="popular"),
    )
    assert only(made).request_id == "fine"
    assert made.counts == JoinCounts(
        impressions=8,
        examples=1,
        degraded=1,
        without_text=2,
        foreign_features=1,
        unreadable=3,
        empty=1,
        feedback=1,
        by_request=1,
    )


def test_nothing_gives_nothing() -> None:
    assert joined([]) == Joined([], JoinCounts(**dict.fromkeys(("feedback",), 0)))
    assert joined([], click(), click(request=None), rating(5)).counts.orphans == 3


# What always holds

FEW = settings(max_examples=40, deadline=None)  # tables cost milliseconds, however small
REQUESTS = st.sampled_from([f"r{number}" for number in range(6)])
NAMED = st.none() | REQUESTS | st.just("lost")
SLATES = st.builds(
    impression,
    request=REQUESTS,
    at_s=st.integers(0, 80),
    shown=st.sampled_from(["01", "10", "23", "03"]),
    unshown=st.just(""),
    user=st.sampled_from(USERS),
    profile_age_ms=st.none() | st.integers(0, 20_000),
)
FEEDBACK = st.builds(
    click,
    item=st.sampled_from(ITEMS),
    at_s=st.integers(0, 90),
    request=NAMED,
    action=st.sampled_from(ACTIONS),
    dwell_s=st.none() | st.integers(0, 200),
    user=st.sampled_from(USERS),
    event=st.just("e"),
) | st.builds(
    rating,
    value=st.integers(1, 5),
    at_s=st.integers(0, 90),
    request=NAMED,
    user=st.sampled_from(USERS),
    event=st.just("e"),
)
ERASURES = st.dictionaries(st.sampled_from([UserId(user) for user in USERS]), st.integers(0, 60_000), max_size=1)


def logs(different_ids: int = 4) -> "st.SearchStrategy[Log]":
    """Returns the strategy of a log. The first few events have ids of their own, the others have them again."""

    def with_ids(events: list[Click | Rating]) -> list[Click | Rating]:
        return [
            msgspec.structs.replace(event, event_id=EventId(f"e{number % different_ids}"))
            for number, event in enumerate(events)
        ]

    return st.tuples(st.lists(SLATES, max_size=8), st.lists(FEEDBACK, max_size=12).map(with_ids), ERASURES)


Log = tuple[list[Impression], list[Click | Rating], dict[UserId, int]]
Thing = TypeVar("Thing")


def same(ones: Sequence[Example], others: Sequence[Example]) -> bool:
    """Whether two lists of examples are the same, to the bit."""

    def parts(example: Example) -> dict[str, object]:
        found = {each.name: getattr(example, each.name) for each in fields(example)}
        tastes: Tastes = found.pop("tastes")
        return found | tastes.answers._asdict() | {"tags_NK": tastes.tags_NK}

    return len(ones) == len(others) and all(
        np.array_equal(value, parts(other)[name], equal_nan=name.endswith(("_N", "_NF", "_E")))
        for one, other in zip(ones, others, strict=True)
        for name, value in parts(one).items()
    )


@FEW
@given(logs(), st.randoms(use_true_random=False))
def test_order_of_the_feedback_within_the_log_makes_no_difference(log: Log, random: Random) -> None:
    impressions, feedback, erasures = log
    before = joined(impressions, *feedback, erasures=erasures)
    shuffled = list(feedback)
    random.shuffle(shuffled)
    after = joined(impressions, *shuffled, erasures=erasures)
    assert same(before.examples, after.examples)
    assert before.counts == after.counts


@FEW
@given(logs())
def test_joining_twice_is_the_same_and_every_record_is_accounted_for(log: Log) -> None:
    impressions, feedback, erasures = log
    once, twice = (joined(impressions, *feedback, erasures=erasures) for _ in range(2))
    assert same(once.examples, twice.examples)
    counts = once.counts
    assert counts == twice.counts
    assert len(impressions) == counts.impressions + counts.resent
    assert len(once.examples) == counts.examples == counts.impressions - counts.waiting - counts.erased
    fates = (counts.by_request, counts.by_item, counts.late, counts.unshown, counts.orphans)
    assert len(feedback) == counts.feedback == sum(fates) + counts.early + counts.forgotten + counts.duplicate
    assert all(one.gains_N.min() >= 0 and not one.gains_N[one.num_shown :].any() for one in once.examples)


@FEW
@given(logs(different_ids=100))
def test_join_is_what_the_rules_say_one_by_one(log: Log) -> None:
    impressions, feedback, erasures = log
    distinct = {one.request_id: one for one in reversed(impressions)}
    found = {one.request_id: one for one in joined(impressions, *feedback, erasures=erasures).examples}
    # 1. Whom each event belongs to, found by looking at every slate.
    live = [one for one in distinct.values() if one.at_ms - (one.profile_age_ms or 0) > erasures.get(one.user_id, -1)]
    gains = {(one.request_id, ranked.item_id): dict[str, float]() for one in live for ranked in one.shown}
    bonus = dict.fromkeys(gains, 0.0)
    for event in sorted(feedback, key=lambda event: event.at_ms):
        slate = _slate_of(event, live)
        if slate is None or event.at_ms > CUTOFF_MS or event.at_ms <= erasures.get(event.user_id, -1):
            continue
        where = (slate.request_id, event.item_id)
        if isinstance(event, Rating):
            gains[where].setdefault("rated", event.value - 3)
        else:
            gain = getattr(SETTINGS, f"{event.action}_gain")
            gains[where][event.action] = gain
            if gain > 0 and event.dwell_s and event.dwell_s > 10:
                bonus[where] = max(bonus[where], 0.25 * min(np.log2(event.dwell_s / 10), 3))
    # 2. Its labels, for every slate that has waited long enough. Several ratings are left to another test.
    ripe = [one for one in live if one.at_ms <= CUTOFF_MS - 5000]
    assert found.keys() == {one.request_id for one in ripe}
    for one in ripe:
        for index, ranked in enumerate(one.shown):
            where = (one.request_id, ranked.item_id)
            example = found[one.request_id]
            if np.isnan(example.ratings_N[index]):
                assert example.gains_N[index] == pytest.approx(max(sum(gains[where].values()) + bonus[where], 0))
                assert example.clicked_N[index] == any(gain > 0 for gain in gains[where].values())
                refused = sum(gains[where].values()) < 0 and not example.clicked_N[index]
                assert (index in example.refused) == refused


def _slate_of(event: Click | Rating, slates: Sequence[Impression]) -> Impression | None:
    own = [
        slate
        for slate in slates
        if slate.user_id == event.user_id
        and event.at_ms - slate.at_ms <= 20_000
        and any(ranked.item_id == event.item_id for ranked in slate.shown)
    ]
    if event.request_id is not None:
        return next((slate for slate in own if slate.request_id == event.request_id), None)
    before = [slate for slate in own if slate.at_ms <= event.at_ms]
    # Of slates of the very same moment any one would do; the join goes by the hash.
    return max(before, key=lambda slate: (slate.at_ms, hash_ids([slate.request_id])[0]), default=None)


def cut(things: Sequence[Thing], sizes: Sequence[int]) -> list[list[Thing]]:
    """Returns the things in pieces of these sizes, over and over."""
    pieces, begin, turn = [], 0, 0
    while begin < len(things):
        pieces.append(list(things[begin : begin + sizes[turn % len(sizes)]]))
        begin, turn = begin + sizes[turn % len(sizes)], turn + 1
    return pieces


SIZES = st.lists(st.integers(1, 5), min_size=1, max_size=3)


def read(
    log: Log, sizes: Sequence[int], *, max_fresh: int = 100, max_replay: int = 100, fresh_since_ms: int | None = None
) -> tuple[Selection, JoinCounts]:
    """Returns what a partition's log gives in pieces; each impression was logged when it was shown."""
    impressions, feedback, erasures = log
    selection = Selection(max_fresh=max_fresh, max_replay=max_replay, half_life_ms=10_000, seed=1)
    pieces = [Chunk(clicks=list(piece)) for piece in cut(feedback, sizes)] + [Chunk(forgotten=erasures)]
    slates = [
        Chunk(impressions=piece, logged_ms={one.request_id: one.at_ms for one in reversed(piece)})
        for piece in cut(impressions, sizes)
    ]
    already = None
    if fresh_since_ms is not None:
        already = AlreadyRead(learned_until_ms=fresh_since_ms, cutoff_ms=fresh_since_ms)
    window = LogWindow(since_ms=0, cutoff_ms=CUTOFF_MS, already=already, offsets={})
    return selection, read_partition(3, pieces, slates, selection, window, SETTINGS)


@FEW
@given(logs(), SIZES)
def test_log_cut_into_pieces_of_any_size_gives_the_same_examples(log: Log, sizes: list[int]) -> None:
    impressions, feedback, erasures = log
    whole = joined(impressions, *feedback, erasures=erasures)
    selection, counts = read(log, sizes)
    assert counts == whole.counts
    assert same(selection.fresh, sorted(whole.examples, key=lambda one: (one.at_ms, one.request_id)))
    assert selection.replay == []


@FEW
@given(logs(), SIZES, SIZES, st.integers(0, 3), st.integers(0, 3), st.integers(0, 80_000))
def test_what_is_kept_does_not_depend_on_how_the_log_is_cut(
    log: Log, sizes: list[int], others: list[int], max_fresh: int, max_replay: int, fresh_since_ms: int
) -> None:
    def limited(pieces: list[int]) -> Selection:
        return read(log, pieces, max_fresh=max_fresh, max_replay=max_replay, fresh_since_ms=fresh_since_ms)[0]

    one, other = limited(sizes), limited(others)
    assert same(one.fresh, other.fresh)
    assert same(one.replay, other.replay)
    everything = read(log, [1], fresh_since_ms=fresh_since_ms)[0]
    assert same(one.fresh, everything.fresh[len(everything.fresh) - min(max_fresh, len(everything.fresh)) :])
    left = len(everything.fresh) + len(everything.replay) - len(one.fresh)
    assert len(one.replay) == min(max_replay, left)


# The selection


def test_fresh_is_what_was_logged_after_the_last_cutoff_less_the_wait() -> None:
    slates = [impression("a", 34), impression("b", 35), impression("c", 35.001), impression("d", 60)]
    selection, _ = read((slates, [], {}), [2], fresh_since_ms=40_000)
    assert [one.request_id for one in selection.fresh] == ["c", "d"]
    assert [one.request_id for one in selection.replay] == ["a", "b"]


def test_history_that_was_imported_since_is_fresh_though_it_is_old() -> None:
    old = impression("a", 10)
    already = AlreadyRead(learned_until_ms=20 * DAY_MS, cutoff_ms=20 * DAY_MS)
    window = LogWindow(since_ms=0, cutoff_ms=30 * DAY_MS, already=already, offsets={})
    chunk = Chunk(impressions=[old], logged_ms={old.request_id: 25 * DAY_MS})
    selection = Selection(max_fresh=5, max_replay=5, half_life_ms=1000, seed=0)
    read_partition(0, [Chunk(clicks=[click(at_s=11, request="a")])], [chunk], selection, window, SETTINGS)
    assert [one.gains_N[0] for one in selection.fresh] == [1]
    assert selection.replay == []


def test_history_that_was_imported_in_a_burst_is_fresh_once_and_replayed_after_that() -> None:
    old = [impression(f"r{number}", number) for number in range(10)]
    live = [impression("live", 26 * 86_400)]
    logged_ms = {one.request_id: 25 * DAY_MS + number for number, one in enumerate(old)} | {"live": live[0].at_ms}

    def read_until(cutoff_ms: int, already: AlreadyRead | None) -> Selection:
        selection = Selection(max_fresh=20, max_replay=20, half_life_ms=1e9, seed=0)
        window = LogWindow(since_ms=0, cutoff_ms=cutoff_ms, already=already, offsets={})
        logged = [one for one in (*old, *live) if logged_ms[one.request_id] < cutoff_ms]
        read_partition(0, [], [Chunk(impressions=logged, logged_ms=logged_ms)], selection, window, SETTINGS)
        return selection

    cutoff_ms = 25 * DAY_MS + 10_000
    first = read_until(cutoff_ms, None)
    learned = split_by_time(first.fresh, TrainingSettings(min_examples=1, holdout_share=0.2, stop_share=0.2))
    assert [one.request_id for one in learned.holdout] == ["r8", "r9"]
    second = read_until(30 * DAY_MS, AlreadyRead(learned_until_ms=learned.learned_until_ms, cutoff_ms=cutoff_ms))
    assert [one.request_id for one in second.fresh] == ["r8", "r9", "live"]
    assert [one.request_id for one in second.replay] == [f"r{number}" for number in range(8)]


def test_erasure_that_only_the_impressions_tell_of_empties_the_reservoir_too() -> None:
    slates = [impression("a", 10), impression("b", 11, user="u1"), impression("c", 70), impression("d", 71, user="u1")]
    chunks = [Chunk(impressions=slates, logged_ms={one.request_id: one.at_ms for one in slates})]
    chunks.append(Chunk(forgotten={UserId("u0"): 72_000}))
    already = AlreadyRead(learned_until_ms=60_000, cutoff_ms=60_000)
    window = LogWindow(since_ms=0, cutoff_ms=CUTOFF_MS, already=already, offsets={})
    selection = Selection(max_fresh=5, max_replay=5, half_life_ms=10_000, seed=0)
    counts = read_partition(0, [], chunks, selection, window, SETTINGS)
    assert [one.request_id for one in selection.fresh] == ["d"]
    assert [one.request_id for one in selection.replay] == ["b"]
    assert (counts.examples, counts.erased) == (2, 2)


def test_replay_prefers_the_recent_by_the_half_life_and_is_a_sample_of_its_seed() -> None:
    plain = joined([impression()]).examples[0]
    ages = [replace(plain, request_id=RequestId(f"r{n}"), at_ms=n * 1000) for n in range(2000)]

    def sample(seed: int) -> list[int]:
        selection = Selection(max_fresh=0, max_replay=200, half_life_ms=500_000, seed=seed)
        for example in ages:
            selection.offer(example, 0, fresh=False)
        return [example.at_ms // 1000 for example in selection.replay]

    assert sample(1) == sample(1) != sample(2)
    drawn = np.concatenate([sample(seed) for seed in range(30)])
    newest, oldest = np.sum(drawn >= 1500), np.sum(drawn < 500)
    assert 6 < newest / oldest < 10  # three half-lives lie between; a little less than 8, since nothing is drawn twice


def test_weights_of_examples_many_half_lives_old_still_differ() -> None:
    plain = joined([impression()]).examples[0]
    selection = Selection(max_fresh=0, max_replay=10, half_life_ms=1, seed=0)
    for n in range(100):
        selection.offer(replace(plain, request_id=RequestId(f"r{n}"), at_ms=n * 1000), 0, fresh=False)
    assert [one.at_ms for one in selection.replay] == [n * 1000 for n in range(90, 100)]


# Records


@dataclass
class Record:
    """What is used of a kafka-python record."""

    key: bytes | None
    value: bytes | None
    timestamp: int = 5


def test_undecodable_records_are_counted_and_cost_nothing_else() -> None:
    good = click()
    records = [
        Record(b"u0", encode(good)),
        Record(b"u0", b"not json"),
        Record(b"u1", encode(click())),
        Record(None, encode(click())),
        Record(b"\xff", None),
        Record(b"u0", b'{"event_id":"e","user_id":"u0","item_id":"i","occurred_at":"1969-01-01T00:00:00Z"}'),
    ]
    chunk = decode_chunk("clicks", records)
    assert chunk == Chunk(clicks=[good], undecodable=5)


def test_null_value_is_an_erasure_at_its_records_time_the_last_one_counts() -> None:
    records = [Record(b"u0", None, 7), Record(b"u0", None, 9), Record(b"u0", None, 8)]
    assert decode_chunk("ratings", records) == Chunk(forgotten={UserId("u0"): 9})
