"""The numbers a model sees: what each says, and that they are always numbers."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from tailrace.catalogue import Catalogue
from tailrace.cosines import HISTORY_ITEMS, Cosines, Floats, history_items, history_mean, make_cosines
from tailrace.counters import CounterTable, item_stats
from tailrace.errors import InvalidRecord
from tailrace.events import Action, Click, Context, Impression, Ranked, Rating, encode
from tailrace.features import (
    FEATURE_NAMES,
    FEATURE_NAMES_HASH,
    PRIOR_WEIGHTS,
    compute_features,
    decode_features,
    encode_features,
    last_visit_ms,
    pool_ranks,
    prior_scores,
)
from tailrace.fold import fold_event
from tailrace.ids import EventId, ItemId, ModelVersion, RequestId, UserId
from tailrace.items import Fact, Item
from tailrace.profile import Profile, Touch
from tests.strategies import CATALOGUE, DAY_MS, clicks, contexts, ratings

NOW_MS = 50 * DAY_MS
MINUTE_MS = 60_000


class Shop:
    """A catalogue, a user and the counters, fed by the real fold."""

    def __init__(self, *items: Item) -> None:
        self.catalogue = Catalogue()
        self.items = {item.item_id: item for item in items}
        for item in items:
            self.catalogue.apply_item(item.item_id, encode(item), NOW_MS - DAY_MS)
        self.table = CounterTable()
        self.profiles: dict[str, Profile] = {}
        self.events = 0

    def click(self, user: str, name: str, at_ms: int, action: Action = "click") -> None:
        self.events += 1
        ids = {"event_id": EventId(f"e{self.events}"), "user_id": UserId(user), "item_id": ItemId(name)}
        click = Click(occurred_at=at_ms, action=action, **ids)
        fold_event(click, self.profile(user), self.table, self.items.get(ItemId(name)))

    def profile(self, user: str) -> Profile:
        return self.profiles.setdefault(user, Profile(UserId(user)))

    def features(self, user: str = "u", *, context: Context | None = None, cosines: Cosines | None = None) -> Floats:
        publish(self.catalogue, self.table)
        rows = self.catalogue.live_rows()
        return compute_features(
            self.catalogue, rows, self.profile(user), context, False, cosines or silent(len(rows)), NOW_MS
        )


def publish(catalogue: Catalogue, table: CounterTable) -> None:
    for item_id in table.dirty:
        catalogue.apply_stats(f"0:{item_id}", encode(item_stats(item_id, 0, table.items[item_id])), NOW_MS)


def silent(count: int) -> Cosines:
    zeros = np.zeros(count, dtype=np.float32)
    return Cosines(zeros, zeros, zeros, zeros)


def book(name: str, *tags: str, author: str = "x", created_ms: int = NOW_MS - DAY_MS) -> Item:
    facts = [Fact("author", author)]
    return Item(item_id=ItemId(name), title=name, tags=list(tags), facts=facts, created_at=created_ms)


def column(features_NF: Floats, name: str) -> list[float]:
    return [float(value) for value in features_NF[:, FEATURE_NAMES.index(name)]]


def test_names_are_distinct_and_the_prior_weighs_only_features_that_exist() -> None:
    assert len(set(FEATURE_NAMES)) == len(FEATURE_NAMES)
    assert set(PRIOR_WEIGHTS) <= set(FEATURE_NAMES)
    assert len(FEATURE_NAMES_HASH) == 16


def test_counters_are_decayed_to_now_and_users_count_once() -> None:
    shop = Shop(book("a"), book("b"))
    for user in ("v", "w", "w"):
        shop.click(user, "a", NOW_MS - 60 * MINUTE_MS)
    features = shop.features()
    assert column(features, "log_users_1h") == pytest.approx([np.log1p(2 * 0.5), 0.0], rel=1e-5)
    assert column(features, "log_clicked_1h") == pytest.approx([np.log1p(3 * 0.5), 0.0], rel=1e-5)
    assert column(features, "rank_log_users_1h") == [1.0, 0.0]
    assert column(features, "log_since_touch_1")[0] == pytest.approx(np.log1p(60), rel=1e-5)


def test_click_rates_start_at_the_prior_and_move_with_evidence() -> None:
    shop = Shop(book("a"), book("b"))
    for number in range(40):
        shown = [Ranked(item_id=ItemId("a"), text="", features="", score=0.0, source="fresh")]
        about = {"event_id": EventId(f"i{number}"), "request_id": RequestId(f"i{number}"), "user_id": UserId("v")}
        impression = Impression(
            **about,
            occurred_at=NOW_MS,
            model_version=ModelVersion("v"),
            feature_names_hash="",
            user_text="",
            shown=shown,
        )
        fold_event(impression, shop.profile("v"), shop.table, None)
    assert column(shop.features(), "click_rate_1h") == pytest.approx([1 / 60, 0.05], rel=1e-4)


def test_newer_items_rank_higher_by_newness_and_those_announced_together_tie() -> None:
    hour_ms = 60 * MINUTE_MS
    shop = Shop(
        book("old", created_ms=NOW_MS - 9 * hour_ms),
        book("one", created_ms=NOW_MS - hour_ms),
        book("two", created_ms=NOW_MS - hour_ms + 500),
    )
    assert column(shop.features(), "rank_newness") == [0.0, 0.75, 0.75]
    assert column(shop.features(), "log_age")[0] == pytest.approx(np.log(10), rel=1e-5)


def test_affinity_follows_what_the_user_liked_and_disliked() -> None:
    shop = Shop(book("a", "gothic", author="Shelley"), book("b", "war", author="Homer"), book("c", "gothic", "war"))
    shop.click("u", "a", NOW_MS - MINUTE_MS, "like")
    shop.click("u", "b", NOW_MS - MINUTE_MS, "hide")
    liked, disliked, both = column(shop.features(), "tag_affinity")
    assert disliked < 0 < liked <= 1
    assert both == pytest.approx(0.0, abs=1e-6)
    assert column(shop.features(), "entity_affinity")[0] > 0


def test_covisited_items_stand_out_for_who_touched_the_other_one() -> None:
    shop = Shop(book("a"), book("b"), book("c"))
    for user in ("v", "w"):
        shop.click(user, "a", NOW_MS - 9 * MINUTE_MS)
        shop.click(user, "b", NOW_MS - 8 * MINUTE_MS)
    shop.click("u", "a", NOW_MS - MINUTE_MS)
    covisit = column(shop.features(), "covisit")
    assert covisit[1] == pytest.approx(np.log1p(2), rel=1e-3)
    assert covisit[2] == 0.0


def test_items_of_those_who_touched_what_the_user_touched_stand_out() -> None:
    shop = Shop(book("a"), book("b"), book("theirs"), book("of others"))
    for user in ("v", "w"):
        for name in ("a", "b", "theirs"):
            shop.click(user, name, NOW_MS - 360 * MINUTE_MS)
    shop.click("x", "of others", NOW_MS)
    shop.click("u", "a", NOW_MS - MINUTE_MS)
    shop.click("u", "b", NOW_MS - MINUTE_MS)
    features = shop.features()
    assert column(features, "overlap")[2:] == pytest.approx([np.log1p(4), 0.0], rel=1e-5)  # two users, two items each
    assert column(features, "overlap_best")[2:] == pytest.approx([np.log1p(2), 0.0], rel=1e-5)
    assert column(features, "overlap_6h")[2:] == pytest.approx([np.log1p(2), 0.0], rel=1e-4)
    assert column(features, "overlap_share")[2:] == pytest.approx([4 / 5, 0.0], rel=1e-5)
    assert column(shop.features("stranger"), "overlap") == [0.0] * 4


def test_fatigue_counts_how_often_this_user_was_shown_the_item() -> None:
    shop = Shop(book("a"), book("b"))
    shop.profile("u").impressions.seen = {ItemId("a"): (NOW_MS - MINUTE_MS, 3)}
    shop.click("u", "b", NOW_MS)
    features = shop.features()
    assert column(features, "shown_to_user") == pytest.approx([np.log1p(3), 0.0])
    assert column(features, "touched_by_user") == [0.0, 1.0]


def test_items_since_the_last_visit_are_told_from_older_ones() -> None:
    shop = Shop(book("old"), book("new", created_ms=NOW_MS - MINUTE_MS))
    shop.click("u", "old", NOW_MS - 120 * MINUTE_MS)
    shop.click("u", "old", NOW_MS - MINUTE_MS)  # the present visit
    for user in ("v", "w"):
        shop.click(user, "new", NOW_MS)
    features = shop.features()
    assert column(features, "newer_than_visit") == [0.0, 1.0]
    assert column(features, "touches_since_visit") == pytest.approx([np.log(2), np.log(3)], rel=1e-5)
    assert column(features, "users_since_visit") == pytest.approx([0.0, np.log(3)], rel=1e-5)
    assert column(features, "age_to_visit")[1] == pytest.approx(np.log(2 / 121), rel=1e-5)
    assert column(shop.features("stranger"), "newer_than_visit") == [0.0, 0.0]


def test_the_last_visit_ended_before_the_newest_gap_of_half_an_hour() -> None:
    profile = Profile(UserId("u"))
    profile.recent = [Touch(minute * MINUTE_MS, ItemId("a"), "click") for minute in (0, 10, 100, 110)]
    assert last_visit_ms(profile, 115 * MINUTE_MS) == 10 * MINUTE_MS
    assert last_visit_ms(profile, 200 * MINUTE_MS) == 110 * MINUTE_MS
    assert last_visit_ms(Profile(UserId("u")), 0) is None


def test_ranks_are_within_the_pool_and_ties_share() -> None:
    assert pool_ranks(np.array([5.0, 1.0, 5.0, 9.0])).tolist() == pytest.approx([0.5, 0.0, 0.5, 1.0])
    assert pool_ranks(np.array([7.0])).tolist() == [0.5]
    assert pool_ranks(np.array([])).tolist() == []


def test_cosines_compare_with_the_text_the_query_and_the_history() -> None:
    items = np.array([[2.0, 0.0], [0.0, 3.0], [0.0, 0.0]])
    recent = np.array([[1.0, 0.0], [0.0, 1.0]])
    cosines = make_cosines(items, np.array([1.0, 0.0]), None, recent)
    assert cosines.user_N.tolist() == [1.0, 0.0, 0.0]
    assert cosines.query_N.tolist() == [0.0, 0.0, 0.0]
    assert cosines.history_N.tolist() == pytest.approx([0.5**0.5, 0.5**0.5, 0.0])
    assert cosines.recent_N.tolist() == [1.0, 1.0, 0.0]
    mean = history_mean(recent)
    assert mean is not None
    assert mean.tolist() == [0.5, 0.5]
    assert history_mean(np.zeros((0, 2))) is None


def test_history_is_the_newest_items_that_were_not_disliked() -> None:
    shop = Shop()
    for number in range(40):
        shop.click("u", f"i{number}", NOW_MS + number, "hide" if number == 39 else "click")
    assert history_items(shop.profile("u")) == [f"i{number}" for number in range(38, 38 - HISTORY_ITEMS, -1)]


def test_a_silent_catalogue_is_ranked_by_cosine_and_a_busy_one_by_its_counters() -> None:
    shop = Shop(book("a"), book("b"))
    near_b = Cosines(np.array([0.1, 0.4], dtype=np.float32), *(np.zeros(2, dtype=np.float32),) * 3)
    assert np.argmax(prior_scores(shop.features(cosines=near_b))) == 1
    for number in range(20):
        shop.click(f"v{number}", "a", NOW_MS - MINUTE_MS)
    assert np.argmax(prior_scores(shop.features(cosines=near_b))) == 0


def test_a_query_outweighs_popularity() -> None:
    shop = Shop(book("a"), book("b"))
    for number in range(50):
        shop.click(f"v{number}", "a", NOW_MS - MINUTE_MS)
    zeros = np.zeros(2, dtype=np.float32)
    asked = Cosines(zeros, np.array([0.1, 0.5], dtype=np.float32), zeros, zeros)
    assert np.argmax(prior_scores(shop.features(cosines=asked))) == 1


def test_a_removed_item_still_has_features() -> None:
    shop = Shop(book("a"), book("b"))
    rows = shop.catalogue.live_rows()
    shop.catalogue.apply_item("a", None, NOW_MS)
    features = compute_features(shop.catalogue, rows, Profile(UserId("u")), None, False, silent(2), NOW_MS)
    assert np.isfinite(features).all()


@settings(deadline=None)
@given(hnp.arrays(np.float32, len(FEATURE_NAMES), elements=st.floats(-1e4, 1e4, width=32)))
def test_features_survive_the_log_bit_for_bit(features_F: Floats) -> None:
    decoded = decode_features(encode_features(features_F))
    assert decoded.tobytes() == features_F.tobytes()


@pytest.mark.parametrize("text", ["%%%", "AAA=", "é"])
def test_what_is_not_base64_of_floats_is_refused(text: str) -> None:
    with pytest.raises(InvalidRecord, match="features"):
        decode_features(text)


@settings(max_examples=100, deadline=None)
@given(
    events=st.lists(clicks | ratings | contexts, max_size=40),
    context=st.none() | contexts,
    now_ms=st.integers(0, 60 * DAY_MS) | st.just(253_402_300_799_000),
    created_ms=st.integers(-(10**14), 10**14),
    cosines=hnp.arrays(np.float32, (4, len(CATALOGUE) + 1), elements=st.floats(-1, 1, width=32)),
)
def test_features_are_finite_and_the_same_again_whatever_the_state(
    events: list[Click | Rating | Context],
    context: Context | None,
    now_ms: int,
    created_ms: int,
    cosines: Floats,
) -> None:
    catalogue, table, profile = Catalogue(), CounterTable(), Profile(UserId("u0"))
    for item in (*CATALOGUE.values(), book("odd", created_ms=created_ms)):
        catalogue.apply_item(item.item_id, encode(item), 0)
    for event in events:
        fold_event(event, profile, table, CATALOGUE.get(getattr(event, "item_id", "")))
    publish(catalogue, table)
    rows = catalogue.live_rows()
    features = compute_features(catalogue, rows, profile, context, True, Cosines(*cosines), now_ms)
    again = compute_features(catalogue, rows, profile, context, True, Cosines(*cosines), now_ms)
    assert features.shape == (len(rows), len(FEATURE_NAMES))
    assert features.dtype == np.float32
    assert np.isfinite(features).all()
    assert features.tobytes() == again.tobytes()
