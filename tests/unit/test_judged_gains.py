"""What the gate holds an order against: a referee's expectations, and a sample that stands for all candidates."""

import math
from dataclasses import replace

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from tests.made_up_slates import make_example
from training.judged_gains import NOTHING_EXPECTED, Referee, fit_referee, judged_gains, judged_ndcgs


def test_what_was_not_shown_counts_with_what_the_referee_expects_of_it() -> None:
    # One click in four places of which the second is seen half as often; a click gains 3.
    seen_K = np.array([1.0, 0.5])
    example = make_example([1, 0], gains=[3.0, 0.0], unshown=2)
    other = make_example([0, 0], unshown=1, number=1)
    champion = [np.array([0.0, 0.0, -1.0, math.nan]), np.zeros(3)]
    challenger = [np.array([0.0, 0.0, 0.5, 0.0]), np.ones(3)]
    first_N, second_N = judged_gains([example, other], champion, challenger, Referee(2.0, 4.0, -1.0), seen_K)
    usual = 3.0 * 4 / 3.0  # of a click, at the first place, where those shown were seen three times in four
    assert first_N.tolist() == pytest.approx([3.0, 0.0, usual / (1 + math.exp(1.0)), 0.0], abs=1e-9)
    assert second_N.tolist() == pytest.approx([0.0, 0.0, usual / (1 + math.exp(-3.0))])
    nothing_N, _ = judged_gains([example, other], champion, challenger, NOTHING_EXPECTED, seen_K)
    assert nothing_N.tolist() == pytest.approx([3.0, 0.0, 0.0, 0.0], abs=1e-9)


def test_a_referee_believes_each_as_far_as_it_was_right() -> None:
    rng = np.random.default_rng(0)
    champion_I, challenger_I = rng.normal(size=(2, 4000)) * [[3.0], [0.2]] + 5.0
    clicked_I = rng.random(4000) < 1 / (1 + np.exp(8.0 - 0.3 * champion_I - challenger_I))
    found = fit_referee(champion_I, challenger_I, clicked_I)
    usual = LogisticRegression(C=1e6).fit(np.stack([champion_I, challenger_I], axis=1), clicked_I)
    assert [found.champion, found.challenger] == pytest.approx(usual.coef_[0].tolist(), rel=0.02)
    assert found.intercept == pytest.approx(float(usual.intercept_[0]), rel=0.02)


def test_a_referee_believes_nobody_who_was_wrong() -> None:
    rng = np.random.default_rng(1)
    champion_I, other_I = rng.normal(size=(2, 2000))
    clicked_I = rng.random(2000) < 1 / (1 + np.exp(2.0 - champion_I + other_I))
    assert fit_referee(champion_I, other_I, clicked_I).challenger == 0.0
    assert fit_referee(champion_I, np.zeros(2000), clicked_I).challenger == 0.0
    broken = fit_referee(champion_I, np.full(2000, math.nan), clicked_I)
    assert broken == NOTHING_EXPECTED
    # Who ranks the other way round than a champion whose scores run against the clicks gets nothing for it.
    assert fit_referee(-champion_I, champion_I, clicked_I) == NOTHING_EXPECTED


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
