"""The world's answer is known, so its laws can be checked."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tailrace.items import Fact, Item
from tailrace.world import Moment, Reader, World

THEMES = ("gothic", "humour", "travel", "science", "poetry", "war")


def make_items(count: int = 60) -> list[Item]:
    return [
        Item(
            item_id=f"book-{number}",
            title=f"Book {number}",
            tags=[THEMES[number % 6], THEMES[(number // 6) % 6]],
            facts=[Fact("author", f"Author {number % 9}")],
        )
        for number in range(count)
    ]


@pytest.fixture(scope="module")
def world() -> World:
    return World(make_items(), seed=3)


NOON = Moment(hours=12.0, device="desktop")


def test_same_seed_gives_the_same_world_and_readers(world: World) -> None:
    again = World(make_items(), seed=3)
    assert np.array_equal(world.attraction(world.reader(5), NOON), again.attraction(again.reader(5), NOON))


def test_another_reader_has_another_taste(world: World) -> None:
    assert not np.allclose(world.attraction(world.reader(1), NOON), world.attraction(world.reader(2), NOON))


@settings(max_examples=50, deadline=None)
@given(number=st.integers(0, 1000), seed=st.integers(0, 2**32 - 1))
def test_no_slate_beats_the_best_slate(world: World, number: int, seed: int) -> None:
    reader = world.reader(number)
    rng = np.random.default_rng(seed)
    other = [world.item_ids[row] for row in rng.permutation(len(world.item_ids))[:8]]
    best = world.expected_clicks(reader, world.best_slate(reader, 8, NOON), NOON)
    assert world.expected_clicks(reader, other, NOON) <= best + 1e-12


def test_clicks_happen_as_often_as_expected(world: World) -> None:
    reader = world.reader(7)
    slate = world.best_slate(reader, 5, NOON)
    expected = world.expected_clicks(reader, slate, NOON)
    rng = np.random.default_rng(0)
    visits = 4000
    clicks = 0
    for _ in range(visits):
        fresh = Reader(reader.user_id, reader.taste_T, reader.drift_T, reader.patience)
        clicks += sum(reaction.action == "click" for reaction in world.react(fresh, slate, NOON, rng))
    # The sum of five independent Bernoullis has a variance of at most 5/4.
    assert abs(clicks / visits - expected) < 4 * np.sqrt(1.25 / visits)


def test_a_book_that_was_read_attracts_little(world: World) -> None:
    reader = world.reader(2)
    best = world.best_slate(reader, 1, NOON)[0]
    before = world.attraction(reader, NOON)[world.item_ids.index(best)]
    reader.read.add(best)
    after = world.attraction(reader, NOON)[world.item_ids.index(best)]
    assert after == pytest.approx(0.05 * before)


def test_tastes_drift(world: World) -> None:
    reader = world.reader(4)
    later = Moment(hours=12.0 + 24 * 15, device="desktop")
    now, then = world.attraction(reader, NOON), world.attraction(reader, later)
    assert np.corrcoef(now, then)[0, 1] < 0.95


def test_some_of_what_is_opened_is_opened_long_after_it_was_shown(world: World) -> None:
    rng = np.random.default_rng(2)
    delays_s = []
    for number in range(400):
        reader = world.reader(number)
        reactions = world.react(reader, world.best_slate(reader, 8, NOON), NOON, rng)
        delays_s += [reaction.delay_s for reaction in reactions if reaction.action == "click"]
        clicked = {one.item_id: one.delay_s for one in reactions if one.action == "click"}
        assert all(one.delay_s > clicked[one.item_id] for one in reactions if one.action in ("like", "save"))
    late_s = [delay for delay in delays_s if delay > 60]
    assert 0.1 < len(late_s) / len(delays_s) < 0.2
    assert 900 < np.median(late_s) < 1600 and np.median(delays_s) < 10


def test_reactions_come_in_time_order_and_name_their_position(world: World) -> None:
    rng = np.random.default_rng(1)
    for number in range(50):
        slate = [world.item_ids[row] for row in rng.permutation(len(world.item_ids))[:8]]
        reactions = world.react(world.reader(number), slate, NOON, rng)
        delays = [reaction.delay_s for reaction in reactions]
        assert delays == sorted(delays)
        assert all(slate[reaction.position] == reaction.item_id for reaction in reactions)
