"""Clicks that are yet to come, in logs whose delays are known."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tailrace.settings import TrainingSettings
from tests.made_up_slates import make_example
from training.arrival import AT_ONCE, fit_arrival, with_arrival
from training.batches import Labels
from training.course import Scores, compute_losses
from training.examination import places_seen
from training.examples import Example

CUTOFF_MS = 1_790_000_000_000
CHANCE = 0.3


def log(count: int, typical_s: float, over_s: float, seed: int) -> tuple[list[Example], int]:
    """Returns slates of four shown over the last `over_s` seconds with what came by the cut-off, and how much did not.

    Half of all clicks take longer than `typical_s`, one in six more than e times as long.
    """
    rng = np.random.default_rng(seed)
    examples, missing = [], 0
    for number, age_s in enumerate(rng.uniform(0, over_s, size=count).tolist()):
        delays_K = rng.lognormal(np.log(typical_s), 1.0, size=4)
        clicked_K = rng.random(4) < CHANCE
        there_K = clicked_K & (delays_K <= age_s)
        missing += int((clicked_K & ~there_K).sum())
        example = make_example(there_K.tolist(), number=number)
        at_ms = CUTOFF_MS - round(age_s * 1000)
        examples.append(replace(example, at_ms=at_ms, delays_s=tuple(delays_K[there_K].tolist())))
    return examples, missing


def known(examples: Sequence[Example]) -> list[Example]:
    return with_arrival(examples, fit_arrival(examples, CUTOFF_MS), CUTOFF_MS)


@pytest.mark.parametrize("typical_s", [5.0, 60.0, 300.0])
def test_shares_are_those_of_the_delays_though_slow_clicks_are_missing(typical_s: float) -> None:
    examples, missing = log(8000, typical_s, over_s=3600.0, seed=1)
    assert missing > (50 if typical_s > 10 else 0)
    arrival = fit_arrival(examples, CUTOFF_MS)
    rng = np.random.default_rng(2)
    true = np.sort(rng.lognormal(np.log(typical_s), 1.0, size=200_000))
    for age_s in (typical_s / 2, typical_s, 3 * typical_s, 8 * typical_s):
        expected = np.searchsorted(true, age_s) / np.searchsorted(true, 3600.0)  # of those within the window
        assert arrival.share(age_s) == pytest.approx(expected, abs=0.03)


def test_who_reckons_with_what_is_to_come_finds_how_often_is_clicked() -> None:
    examples, missing = log(4000, 200.0, over_s=1200.0, seed=3)
    clicks = sum(int(one.clicked_N.sum()) for one in examples)
    assert missing > 0.2 * clicks
    by_place = np.array([places_seen(one, np.ones(4)) for one in known(examples)])
    within = 0.963  # of clicks take less than 1200 s
    assert clicks / by_place.sum() == pytest.approx(within * CHANCE, rel=0.05)
    assert clicks / by_place.size < 0.85 * CHANCE


def test_few_clicks_and_old_slates_are_taken_as_they_are() -> None:
    few, _ = log(30, 200.0, over_s=600.0, seed=4)
    assert fit_arrival(few, CUTOFF_MS) == AT_ONCE and known(few) == few
    old = [replace(one, at_ms=one.at_ms - 10**9) for one in log(500, 20.0, over_s=600.0, seed=5)[0]]
    assert [one.arrived for one in known(old)] == [1.0] * 500


@given(
    st.lists(st.tuples(st.floats(0, 100), st.floats(0, 100)), min_size=60, max_size=90),
    st.lists(st.floats(0, 200), min_size=2, max_size=6),
)
def test_shares_rise_with_age_and_stay_between_a_tenth_and_all(
    clicks: list[tuple[float, float]], ages: list[float]
) -> None:
    examples = [
        replace(make_example([1]), at_ms=CUTOFF_MS - round(1000 * (delay + rest)), delays_s=(delay,))
        for delay, rest in clicks
    ]
    shares = [fit_arrival(examples, CUTOFF_MS).share(age) for age in sorted(ages)]
    assert shares == sorted(shares) and all(0.1 <= share <= 1.0 for share in shares)


def test_slate_whose_clicks_have_half_arrived_is_expected_to_be_clicked_half_as_often() -> None:
    def pointwise(arrived: float, logit: float) -> float:
        full, clicked = torch.ones(1, 4, dtype=torch.bool), torch.tensor([[True, False, False, False]])
        labels = Labels(
            real=full,
            shown=full,
            gains=clicked.float(),
            clicked=clicked,
            ratings=torch.full((1, 4), torch.nan),
            weights=torch.ones(1),
            arrived=torch.tensor([arrived]),
            replayed=torch.zeros(1, dtype=torch.bool),
        )
        logits = torch.full((1, 4), logit)
        scores = Scores(logits, torch.zeros(1, 4), torch.zeros(1, 4))
        return float(compute_losses(scores, labels, torch.zeros(1, 4), TrainingSettings())["pointwise"])

    logits = np.linspace(-3, 3, 121)
    whole, half = (logits[np.argmin([pointwise(arrived, one) for one in logits])] for arrived in (1.0, 0.5))
    assert half - whole == pytest.approx(np.log(2), abs=0.05)


def test_who_said_no_has_looked_wherever_it_stood() -> None:
    example = replace(make_example([0, 0, 1, 0]), refused=(1, 3), arrived=0.5)
    assert places_seen(example, np.array([1.0, 0.6, 0.4])).tolist() == [0.5, 1.0, 0.2, 1.0]
