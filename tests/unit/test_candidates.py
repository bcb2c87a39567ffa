"""Which items are considered, and which are not."""

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from services.candidates import Candidates, PoolRequest, build_pool, nearest
from services.filters import Filters
from tailrace.catalogue import Catalogue
from tailrace.counters import CounterTable, item_stats
from tailrace.events import Action, Click, Rating, encode
from tailrace.features import PRIOR_WEIGHTS
from tailrace.fold import fold_event
from tailrace.ids import EventId, ItemId, UserId
from tailrace.items import Fact, Item
from tailrace.profile import Profile
from tailrace.responses import gather_responses, topic_pulls
from tailrace.tastes import BUCKETS, bucket
from tailrace.text import now_interests

NOW_MS = 1_700_000_000_000
DIMENSIONS = 4
THEMES = ("gothic", "war", "travel", "humour")


def make_items(count: int) -> list[Item]:
    return [
        Item(
            item_id=ItemId(f"i{number}"),
            title=f"Item {number}",
            tags=[THEMES[number % 4], "even" if number % 2 == 0 else "odd"],
            facts=[Fact("author", f"author {number % 5}")],
            attributes={"year": float(1800 + number), "form": "novel" if number % 3 else "play", "signed": True},
            created_at=NOW_MS - (count - number) * 1000,
        )
        for number in range(count)
    ]


class Shelf:
    """A catalogue of numbered items whose vectors point to their theme, and the events of some users."""

    def __init__(self, count: int = 40) -> None:
        self.items = make_items(count)
        self.catalogue = Catalogue()
        for item in self.items:
            self.catalogue.apply_item(item.item_id, encode(item), NOW_MS - 10_000)
        self.vectors = np.eye(DIMENSIONS, dtype=np.float32)[[number % 4 for number in range(count)]]
        self.table = CounterTable()
        self.profiles: dict[str, Profile] = {}

    def act(self, user: str, number: int, action: Action = "click") -> None:
        about = {"event_id": EventId(f"{user}-{number}-{action}"), "item_id": ItemId(f"i{number}")}
        click = Click(user_id=UserId(user), occurred_at=NOW_MS - 1000, action=action, **about)
        fold_event(click, self.profile(user), self.table, self.items[number])
        for item_id in self.table.dirty:
            stats = item_stats(item_id, 0, self.table.items[item_id])
            self.catalogue.apply_stats(f"0:{item_id}", encode(stats), NOW_MS)
        self.table.dirty.clear()

    def profile(self, user: str) -> Profile:
        return self.profiles.setdefault(user, Profile(UserId(user)))

    def pool(self, user: str = "u", *, num_candidates: int = 20, seed: int = 0, **asked: object) -> Candidates:
        profile = self.profile(user)
        responses = gather_responses(profile, self.catalogue.topics, NOW_MS)
        asked.setdefault("pulls", topic_pulls(now_interests(profile, NOW_MS), responses, PRIOR_WEIGHTS))
        request = PoolRequest(profile=profile, now_ms=NOW_MS, num_candidates=num_candidates, **asked)
        return build_pool(self.catalogue, self.vectors, request, np.random.default_rng(seed))

    def filtered(self, **filters: object) -> set[int]:
        pool = self.pool(num_candidates=1000, filters=msgspec.convert(filters, Filters))
        assert pool.removed.get("filtered", 0) + len(pool.rows_N) == len(self.items)
        return set(pool.rows_N.tolist())


def test_a_pool_is_distinct_full_and_names_a_source_for_each() -> None:
    shelf = Shelf()
    for number in (3, 10, 11):
        shelf.act("v", number)
    shelf.act("w", 14)
    shelf.act("u", 3)
    pool = shelf.pool(user_D=np.eye(4)[0], history_D=np.eye(4)[1])
    assert len(set(pool.rows_N.tolist())) == len(pool.rows_N) == len(pool.sources_N) == 20
    assert set(pool.sources_N) == {"user", "history", "covisited", "interests", "trending", "fresh", "cold"}


def test_what_a_model_has_learned_of_tags_draws_candidates_for_anybody() -> None:
    worth_V = np.zeros(BUCKETS, np.float32)
    worth_V[bucket("war")], worth_V[bucket("odd")] = 2.0, -1.0
    pool = Shelf().pool("nobody-knows", num_candidates=12, tag_worth_V=worth_V)
    drawn = [row for row, source in zip(pool.rows_N.tolist(), pool.sources_N, strict=True) if source == "interests"]
    assert drawn and all(row % 4 == 1 for row in drawn)  # items of war, all of them odd: worth (2 - 1) / sqrt(2)
    assert Shelf().pool("nobody-knows", tag_worth_V=np.zeros(BUCKETS, np.float32)).sources_N.count("interests") == 0


def test_asking_for_more_than_there_is_gives_all_there_is() -> None:
    pool = Shelf(7).pool(num_candidates=300)
    assert sorted(pool.rows_N.tolist()) == list(range(7))


def test_a_new_user_of_a_silent_catalogue_gets_fresh_and_cold_items_and_the_empty_source_is_told() -> None:
    pool = Shelf().pool()
    assert set(pool.sources_N) == {"fresh", "cold"}
    assert pool.empty == ["trending"]


def test_a_query_fills_most_of_the_pool_with_what_is_near_it() -> None:
    shelf = Shelf()
    pool = shelf.pool(query_D=np.eye(4)[2], num_candidates=12)
    of_query = [row for row, source in zip(pool.rows_N.tolist(), pool.sources_N, strict=True) if source == "query"]
    assert len(of_query) >= 6
    assert all(row % 4 == 2 for row in of_query)


def test_what_users_touch_now_trends() -> None:
    shelf = Shelf()
    for user in ("v", "w", "x"):
        shelf.act(user, 17)
    shelf.act("v", 8)
    pool = shelf.pool()
    trending = [row for row, source in zip(pool.rows_N.tolist(), pool.sources_N, strict=True) if source == "trending"]
    assert trending == [17, 8]


def test_seen_items_are_left_out_unless_asked_for_and_hidden_ones_always() -> None:
    shelf = Shelf()
    shelf.act("u", 1)
    shelf.act("u", 2, "hide")
    rating = Rating(event_id=EventId("r"), user_id=UserId("u"), item_id=ItemId("i5"), occurred_at=NOW_MS, value=2)
    fold_event(rating, shelf.profile("u"), shelf.table, None)
    pool = shelf.pool(num_candidates=1000)
    assert not {1, 2, 5} & set(pool.rows_N.tolist())
    assert pool.removed == {"hidden": 1, "seen": 2}
    again = shelf.pool(num_candidates=1000, keep_seen=True)
    assert {1, 5} <= set(again.rows_N.tolist())
    assert again.removed == {"hidden": 1}


def test_excluded_and_removed_items_do_not_come_back() -> None:
    shelf = Shelf()
    shelf.catalogue.apply_item("i7", None, NOW_MS)
    pool = shelf.pool(num_candidates=1000, exclude=["i3", "unheard-of"], user_D=np.eye(4)[3])
    assert not {3, 7} & set(pool.rows_N.tolist())
    assert pool.removed == {"excluded": 1}


def test_the_callers_own_list_keeps_its_order_and_is_filtered_like_any_other() -> None:
    shelf = Shelf()
    shelf.act("u", 2)
    pool = shelf.pool(candidates=["i9", "nobody-knows", "i2", "i4", "i9"], exclude=["i4"])
    assert pool.rows_N.tolist() == [9]
    assert pool.sources_N == ["caller"]
    assert pool.removed == {"unknown": 1, "seen": 1, "excluded": 1}
    assert shelf.pool(candidates=["i9", "i4", "i11"]).rows_N.tolist() == [9, 4, 11]
    assert shelf.pool(candidates=[]).rows_N.tolist() == []


def test_filters_keep_what_fits_every_condition() -> None:
    shelf = Shelf()
    numbers = range(len(shelf.items))
    assert shelf.filtered(tags_any=["gothic", "war"]) == {n for n in numbers if n % 4 in (0, 1)}
    assert shelf.filtered(tags_all=["gothic", "odd"]) == set()
    assert shelf.filtered(tags_none=["even"]) == {n for n in numbers if n % 2 == 1}
    assert shelf.filtered(facts=[{"relation": "author", "entity": "author 2"}]) == {n for n in numbers if n % 5 == 2}
    assert shelf.filtered(attributes={"form": "play"}) == {n for n in numbers if n % 3 == 0}
    assert shelf.filtered(attributes={"year": {"min": 1810, "max": 1812}}) == {10, 11, 12}
    assert shelf.filtered(attributes={"year": 1810, "form": "novel"}, tags_all=["even"]) == {10}
    assert shelf.filtered(attributes={"pages": {"min": 1}}) == set()
    assert shelf.filtered(tags_any=["no such tag"]) == set()


def test_numbers_and_truth_are_not_mistaken_for_each_other() -> None:
    shelf = Shelf()
    assert shelf.filtered(attributes={"signed": True}) == set(range(len(shelf.items)))
    assert shelf.filtered(attributes={"signed": 1.0}) == set()
    assert shelf.filtered(attributes={"signed": {"min": 0}}) == set()
    assert shelf.filtered(attributes={"form": {"min": 0}}) == set()


def test_a_filter_with_an_unknown_field_is_refused_by_name() -> None:
    with pytest.raises(msgspec.ValidationError, match="tag_any"):
        msgspec.json.decode(b'{"tag_any":["gothic"]}', type=Filters)


def test_rows_without_a_vector_and_vectors_that_are_no_numbers_offer_nothing() -> None:
    vectors = np.array([[1.0, 0.0], [0.0, 0.0], [0.5, 0.5]], dtype=np.float32)
    allowed = np.ones(5, dtype=np.bool_)  # the catalogue has grown since
    assert nearest(vectors, np.array([1.0, 0.0]), allowed, 9).tolist() == [0, 2]
    assert nearest(vectors.astype(np.float16), np.array([1.0, 0.0]), allowed, 1).tolist() == [0]
    assert nearest(vectors, np.array([np.nan, 0.0]), allowed, 9).tolist() == []


def test_the_same_seed_draws_the_same_pool_and_another_explores_other_items() -> None:
    shelf = Shelf(200)
    assert shelf.pool(seed=1).rows_N.tolist() == shelf.pool(seed=1).rows_N.tolist()
    drawn = {row for seed in range(30) for row in shelf.pool(seed=seed, num_candidates=100).rows_N.tolist()}
    assert len(drawn) > 120


@settings(max_examples=60, deadline=None)
@given(
    touched=st.lists(st.tuples(st.integers(0, 39), st.sampled_from(["click", "hide", "save", "skip"])), max_size=12),
    excluded=st.sets(st.integers(0, 45).map(lambda number: f"i{number}"), max_size=20),
    tags=st.lists(st.sampled_from(THEMES), max_size=2),
    num_candidates=st.integers(1, 60),
    asked=st.sets(st.sampled_from(["user_D", "query_D", "history_D"])),
)
def test_a_pool_never_holds_what_may_not_be_shown_and_is_as_full_as_it_can_be(
    touched: list[tuple[int, Action]], excluded: set[str], tags: list[str], num_candidates: int, asked: set[str]
) -> None:
    shelf = Shelf()
    for number, action in touched:
        shelf.act("u", number, action)
    vectors = {name: np.eye(DIMENSIONS)[1] for name in asked}
    pool = shelf.pool(num_candidates=num_candidates, exclude=excluded, filters=Filters(tags_none=tags), **vectors)
    may_be_shown = {
        number
        for number, item in enumerate(shelf.items)
        if item.item_id not in excluded
        and number not in {touch for touch, _ in touched}
        and not set(tags) & set(item.tags)
    }
    rows = pool.rows_N.tolist()
    assert len(set(rows)) == len(rows) == min(num_candidates, len(may_be_shown))
    assert set(rows) <= may_be_shown
    assert sum(pool.removed.values()) + len(may_be_shown) == len(shelf.items)
