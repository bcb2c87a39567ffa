"""What the gate holds an order against: a referee's expectations, and a sample that stands for all candidates."""

import math
from dataclasses import replace

import numpy as np
import pytest

from tests.made_up_slates import make_example
from training.judged_gains import NOTHING_EXPECTED, Referee, fit_referee, judged_gains, judged_ndcgs, stands_for


def test_what_was_not_shown_counts_with_what_the_referee_expects_of_it() -> None:
    # One click in four places of which the second is seen half as often; a click gains 3.
    seen_K = np.array([1.0, 0.5])
    example = make_example([1, 0], gains=[3.0, 0.0], unshown=2)
    other = make_example([0, 0], unshown=1, number=1)
    champion = [np.array([0.0, 0.0, -1.0, math.nan]), np.zeros(3)]
    challenger = [np.array([0.0, 0.0, 0.5, 0.0]), np.ones(3)]
    first_N, second_N = judged_gains([example, other], champion, challenger, Referee(2.0, 4.0, -1.0), seen_K)
    assert first_N.tolist() == pytest.approx([3.0, 0.0, 3.0 / (1 + math.exp(1.0)), 0.0])
    assert second_N.tolist() == pytest.approx([0.0, 0.0, 3.0 / (1 + math.exp(-3.0))])
    nothing_N, _ = judged_gains([example, other], champion, challenger, NOTHING_EXPECTED, seen_K)
    assert nothing_N.tolist() == [3.0, 0.0, 0.0, 0.0]
    # Below what the champion ever showed it is asked alone.
    unknown = Referee(2.0, 4.0, -1.0, alone=1.0, alone_intercept=-2.0, known_from=-0.5)
    first_N, _ = judged_gains([example, other], champion, challenger, unknown, seen_K)
    assert first_N[2] == pytest.approx(3.0 / (1 + math.exp(3.0)))


@pytest.mark.parametrize("steepness", [0.0, 1.0])
def test_a_referee_believes_each_as_far_as_it_was_right_wherever_it_stood(steepness: float) -> None:
    rng = np.random.default_rng(0)
    champion_I, challenger_I = rng.normal(size=(2, 40_000)) * [[3.0], [1.0]] + 5.0
    # What the champion thought well of stood high, and was seen more.
    seen_I = (np.argsort(np.argsort(-champion_I.reshape(-1, 8)), axis=1).ravel() + 1.0) ** -steepness
    clicked_I = rng.random(40_000) < seen_I / (1 + np.exp(8.0 - 0.3 * champion_I - challenger_I))
    found = fit_referee(champion_I, challenger_I, clicked_I, seen_I)
    assert [found.champion, found.challenger] == pytest.approx([0.3, 1.0], rel=0.06)
    assert found.intercept == pytest.approx(-8.0, rel=0.05)


def test_a_referee_believes_nobody_who_was_wrong() -> None:
    rng = np.random.default_rng(1)
    seen_I = np.ones(2000)
    champion_I, other_I = rng.normal(size=(2, 2000))
    clicked_I = rng.random(2000) < 1 / (1 + np.exp(2.0 - champion_I + other_I))
    assert fit_referee(champion_I, other_I, clicked_I, seen_I).challenger == 0.0
    assert fit_referee(champion_I, np.zeros(2000), clicked_I, seen_I).challenger == 0.0
    assert fit_referee(champion_I, np.full(2000, math.nan), clicked_I, seen_I) == NOTHING_EXPECTED
    # Nor a challenger who says what the champion says: what it would say elsewhere was never held against anything.
    same = fit_referee(champion_I, champion_I, clicked_I, seen_I)
    assert same.challenger < 0.02 * same.champion
    # Who ranks the other way round than a champion whose scores run against the clicks gets nothing for it.
    assert fit_referee(-champion_I, champion_I, clicked_I, seen_I) == NOTHING_EXPECTED


def test_where_there_is_nothing_to_gain_nothing_is_judged() -> None:
    example = make_example([0, 0], unshown=2)
    gains = judged_gains([example], [np.arange(4.0)], [np.arange(4.0)], NOTHING_EXPECTED, np.ones(2))
    assert np.isnan(judged_ndcgs([example], [np.arange(4.0)], gains, top=10)).all()


@pytest.mark.parametrize(("ranked", "unshown", "times"), [(200, 5, 38), (0, 5, 1), (4, 5, 1), (14, 4, 2), (8, 0, 1)])
def test_each_logged_candidate_stands_for_as_many_as_it_was_drawn_from(ranked: int, unshown: int, times: int) -> None:
    example = replace(make_example([0] * 8, unshown=unshown), num_candidates=ranked)
    assert stands_for(example).tolist() == [1] * 8 + [times] * unshown


def test_a_sample_of_those_not_shown_stands_for_all_of_them() -> None:
    # Two hundred candidates, of which eight were shown; all labels known, and once of five others only.
    rng = np.random.default_rng(2)
    whole, sampled = [], []
    for number in range(400):
        example = make_example(rng.random(8) < 0.2, unshown=192, number=number)
        gains_N, scores_N = rng.random(200) ** 4, rng.normal(size=200)
        scores_N += 2.0 * gains_N
        kept = np.r_[np.arange(8), 8 + rng.permutation(192)[:5]]
        few = make_example(example.clicked_N[:8].tolist(), unshown=5, number=number)
        whole.append((replace(example, num_candidates=200), scores_N, gains_N))
        sampled.append((replace(few, num_candidates=200), scores_N[kept], gains_N[kept]))
    found, estimated, naive = (
        float(np.mean(judged_ndcgs(*(list(part) for part in zip(*of, strict=True)), top=10)))
        for of in (whole, sampled, [(replace(one, num_candidates=0), *rest) for one, *rest in sampled])
    )
    assert estimated == pytest.approx(found, abs=0.05)
    assert naive > found + 0.1
