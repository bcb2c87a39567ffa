"""How ranked candidates become a slate, and with what probability."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from services.slate import Slot, build_slate, draw, place_probabilities


def slate_of(
    scores: list[float],
    vectors: NDArray[np.floating] | None = None,
    tags: list[list[str]] | None = None,
    *,
    n: int = 3,
    diversity: float = 0.0,
    max_per_tag: int = 0,
    exploration: float = 0.0,
    explore_pool: int = 50,
    seed: int = 0,
) -> list[Slot]:
    return build_slate(
        np.array(scores),
        np.eye(len(scores)) if vectors is None else vectors,
        tags or [[]] * len(scores),
        n=n,
        diversity=diversity,
        max_per_tag=max_per_tag,
        exploration=exploration,
        explore_pool=explore_pool,
        rng=np.random.default_rng(seed),
    )


def indexes(slots: list[Slot]) -> list[int]:
    return [slot.index for slot in slots]


def test_without_diversity_and_exploration_the_best_come_first_for_certain() -> None:
    slots = slate_of([0.1, 0.9, 0.5, 0.7])
    assert indexes(slots) == [1, 3, 2]
    assert [slot.position for slot in slots] == [0, 1, 2]
    assert [slot.propensity for slot in slots] == [1.0, 1.0, 1.0]
    assert [slot.score for slot in slots] == [0.9, 0.7, 0.5]
    assert not any(slot.explored or slot.relaxed for slot in slots)


def test_diversity_puts_what_is_unlike_before_a_near_copy() -> None:
    vectors = np.array([[1.0, 0.0], [0.99, 0.1], [0.0, 1.0]])
    assert indexes(slate_of([1.0, 0.9, 0.8, ], vectors, n=2)) == [0, 1]  # fmt: skip
    assert indexes(slate_of([1.0, 0.9, 0.8], vectors, n=2, diversity=0.7)) == [0, 2]


def test_diversity_does_not_depend_on_the_scale_of_the_scores() -> None:
    rng = np.random.default_rng(2)
    scores, vectors = rng.normal(size=40), rng.normal(size=(40, 5))
    small = slate_of(list(scores), vectors, n=10, diversity=0.3)
    large = slate_of(list(1000 * scores + 77), vectors, n=10, diversity=0.3)
    assert indexes(small) == indexes(large)


def test_no_tag_fills_more_than_its_share() -> None:
    tags = [["a"], ["a"], ["a", "b"], ["b"], ["c"]]
    slots = slate_of([5, 4, 3, 2, 1], tags=tags, n=4, max_per_tag=2)
    assert indexes(slots) == [0, 1, 3, 4]
    assert not any(slot.relaxed for slot in slots)


def test_the_cap_gives_way_before_the_slate_stays_short() -> None:
    slots = slate_of([5, 4, 3, 2], tags=[["a"]] * 4, n=4, max_per_tag=2)
    assert indexes(slots) == [0, 1, 2, 3]
    assert [slot.relaxed for slot in slots] == [False, False, True, True]


def test_a_slate_is_never_longer_than_its_pool() -> None:
    assert indexes(slate_of([1.0, 2.0], n=9)) == [1, 0]
    assert build_slate(
        np.zeros(0), np.zeros((0, 2)), [], n=5, diversity=0.1, max_per_tag=2, exploration=0.1, explore_pool=5,
        rng=np.random.default_rng(0),
    ) == []  # fmt: skip


def test_a_score_that_is_no_number_ranks_last() -> None:
    assert indexes(slate_of([float("nan"), 0.1, float("-inf")], n=1)) == [1]


def test_explored_items_are_marked_and_come_from_the_next_best() -> None:
    first = [slate_of([9, 8, 7, 6, 5], n=1, exploration=0.5, explore_pool=2, seed=seed)[0] for seed in range(300)]
    assert {slot.index for slot in first} == {0, 1, 2}
    assert all(slot.explored == (slot.index > 0) for slot in first)
    assert all(slot.propensity == (0.25 if slot.explored else 0.5) for slot in first)


def test_first_places_are_taken_as_often_as_their_propensity_says() -> None:
    rng = np.random.default_rng(5)
    scores, vectors = list(rng.normal(size=12)), rng.normal(size=(12, 3))
    rounds = 4000
    taken: Counter[int] = Counter()
    logged: dict[int, float] = {}
    for seed in range(rounds):
        slot = slate_of(scores, vectors, n=1, diversity=0.3, exploration=0.4, explore_pool=6, seed=seed)[0]
        taken[slot.index] += 1
        logged[slot.index] = slot.propensity
    assert sum(logged.values()) == pytest.approx(1.0)
    for index, propensity in logged.items():
        deviation = (propensity * (1 - propensity) / rounds) ** 0.5
        assert abs(taken[index] / rounds - propensity) < 5 * deviation


def test_weighing_clicks_by_propensity_recovers_what_the_best_item_alone_would_earn() -> None:
    # Inverse propensity: of the slates drawn, those with the best item first stand for all.
    joy = [0.6, 0.1, 0.1, 0.1]
    rng = np.random.default_rng(1)
    weighed = []
    for seed in range(4000):
        slot = slate_of([4, 3, 2, 1], n=1, exploration=0.3, explore_pool=3, seed=seed)[0]
        clicked = rng.random() < joy[slot.index]
        weighed.append(clicked / slot.propensity if slot.index == 0 else 0.0)
    assert np.mean(weighed) == pytest.approx(0.6, abs=0.06)


@settings(deadline=None)
@given(
    num_eligible=st.integers(1, 80),
    exploration=st.floats(0, 1),
    explore_pool=st.integers(1, 60),
    uniform=st.floats(0, 1, exclude_max=True),
)
def test_probabilities_of_a_place_are_valid_and_only_what_has_one_is_drawn(
    num_eligible: int, exploration: float, explore_pool: int, uniform: float
) -> None:
    probabilities = place_probabilities(num_eligible, exploration, explore_pool)
    assert probabilities.sum() == pytest.approx(1.0)
    assert (probabilities >= 0).all()
    assert probabilities[draw(probabilities, uniform)] > 0


@settings(deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    count=st.integers(1, 30),
    n=st.integers(1, 12),
    diversity=st.floats(0, 1),
    max_per_tag=st.integers(0, 3),
    exploration=st.floats(0, 1),
    explore_pool=st.integers(1, 10),
)
def test_every_slate_is_full_distinct_and_has_a_probability_for_each_place(
    seed: int, count: int, n: int, diversity: float, max_per_tag: int, exploration: float, explore_pool: int
) -> None:
    rng = np.random.default_rng(seed)
    tags = [list(rng.choice(["a", "b", "c"], size=rng.integers(0, 3), replace=False)) for _ in range(count)]
    slots = slate_of(
        list(rng.normal(size=count)),
        rng.normal(size=(count, 4)),
        tags,
        n=n,
        diversity=diversity,
        max_per_tag=max_per_tag,
        exploration=exploration,
        explore_pool=explore_pool,
        seed=seed,
    )
    assert len(slots) == len(set(indexes(slots))) == min(n, count)
    assert all(0 < slot.propensity <= 1 for slot in slots)
    if max_per_tag and not any(slot.relaxed for slot in slots):
        counts = Counter(tag for slot in slots for tag in tags[slot.index])
        assert all(count <= max_per_tag for count in counts.values())
