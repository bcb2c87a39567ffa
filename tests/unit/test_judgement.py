"""When a canary takes over, goes, or is watched for longer, and how often chance alone would condemn a good one."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

from tailrace.settings import GateSettings
from training.judgement import GROUPS, NO_EVIDENCE, Evidence, judge, judge_fresh

GATE = GateSettings(canary_impressions=300, max_click_loss=0.2, max_error_share=0.05, max_latency_ratio=1.5)
SLATE = 8


def evidence(
    rate: float, impressions: int, *, below_top: int = 0, errors: int = 0, ms: float = 10.0, users: int = 1000
) -> Evidence:
    """Each group shows and clicks the same: what remains is the noise of independent items."""
    groups = min(users, GROUPS)
    shown_G = np.zeros(GROUPS, np.int64)
    shown_G[:groups] = np.diff(np.linspace(0, impressions * SLATE, groups + 1).astype(np.int64))
    ends = np.round(np.concatenate([[0], np.cumsum(shown_G)]) * rate).astype(np.int64)
    return Evidence(impressions, below_top, errors, ms, impressions, shown_G, np.diff(ends))


def test_equal_canary_is_promoted_once_it_has_shown_enough() -> None:
    champion = evidence(0.15, 5000)
    assert judge(champion, evidence(0.15, 299), GATE).action == "wait"
    found = judge(champion, evidence(0.15, 400), GATE)
    assert found.action == "promote" and "keeps the clicks" in found.reason


def test_better_canary_is_promoted() -> None:
    assert judge(evidence(0.10, 3000), evidence(0.15, 300), GATE).action == "promote"


def test_canary_that_loses_half_of_the_clicks_is_rolled_back_before_it_has_shown_all_it_was_to_show() -> None:
    found = judge(evidence(0.15, 2000), evidence(0.05, 150), GATE)
    assert found.action == "rollback" and "20% of the clicks" in found.reason


def test_canary_that_loses_just_what_it_may_is_watched_for_longer() -> None:
    assert judge(evidence(0.15, 5000), evidence(0.12, 400), GATE).action == "wait"


def test_a_canary_always_ends() -> None:
    champion = evidence(0.15, 20_000)
    assert judge(champion, evidence(0.121, 1200), GATE).action == "promote"
    assert judge(champion, evidence(0.119, 1200), GATE).action == "rollback"
    # One reader, ten readers, or no click at all: there is nothing to test, and nothing was found.
    assert judge(champion, evidence(0.15, 1200, users=1), GATE).action == "promote"
    assert judge(champion, evidence(0.05, 1200, users=1), GATE).action == "rollback"
    assert judge(evidence(0.0, 20_000), evidence(0.0, 1200), GATE).action == "promote"


@pytest.mark.parametrize("impressions", [0, 1, 10, 49])
def test_too_little_is_no_reason_for_anything(impressions: int) -> None:
    assert judge(evidence(0.15, 5000), evidence(0.0, impressions), GATE).action == "wait"
    assert judge(NO_EVIDENCE, evidence(0.15, impressions), GATE).action == "wait"


def test_canary_whose_requests_miss_the_top_rung_is_rolled_back() -> None:
    champion = evidence(0.15, 1000, below_top=10)
    assert judge(champion, evidence(0.15, 25, below_top=25), GATE).action == "rollback"
    found = judge(champion, evidence(0.15, 200, below_top=40), GATE)
    assert found.action == "rollback" and "40 of 200, champion 10 of 1000" in found.reason
    # Both suffer alike: the machine is overloaded, and no version is to blame.
    assert judge(replace(champion, below_top=200), evidence(0.15, 200, below_top=40), GATE).action == "wait"


def test_slow_canary_is_rolled_back_once_enough_were_timed() -> None:
    champion = evidence(0.15, 1000, ms=10.0)
    assert judge(champion, evidence(0.15, 99, ms=16.0), GATE).action == "wait"
    found = judge(champion, evidence(0.15, 100, ms=16.0), GATE)
    assert found.action == "rollback" and "16.0 ms" in found.reason and "10.0 ms" in found.reason
    assert judge(champion, evidence(0.15, 100, ms=14.0), GATE).action == "wait"


def test_refused_canary_is_rolled_back_with_its_reason() -> None:
    refused = replace(NO_EVIDENCE, refused="scorer.onnx does not have the sum")
    assert judge(evidence(0.15, 10), refused, GATE).reason == "refused: scorer.onnx does not have the sum"
    assert judge_fresh(evidence(0.15, 10), refused, GATE).action == "rollback"


def test_fresh_champion_goes_when_its_model_fails_and_not_when_load_degrades_answers() -> None:
    before = evidence(0.15, 2000, errors=4)
    assert judge_fresh(before, evidence(0.15, 100, errors=30), GATE).action == "rollback"
    assert judge_fresh(before, evidence(0.15, 100, below_top=100, errors=1), GATE).action == "wait"
    assert judge_fresh(NO_EVIDENCE, evidence(0.15, 40, errors=40), GATE).action == "rollback"
    assert judge_fresh(NO_EVIDENCE, evidence(0.15, 10, errors=10), GATE).action == "wait"


# -- chance --------------------------------------------------------------------------------------------------------


def outcomes(relative: float, *, trials: int, seed: int, num_users: int = 400, share: float = 0.2) -> Counter[str]:
    """How canaries with this click rate, relative to the champion's, end under a look at every 20th impression.

    Users differ in how much they click (beta, standard deviation a third of the mean) and visit many times.
    """
    rng = np.random.default_rng(seed)
    ends: Counter[str] = Counter()
    for _ in range(trials):
        mean, strength = 0.12, 60.0
        clicks_U = rng.beta(mean * strength, (1 - mean) * strength, num_users)
        in_canary_U = rng.random(num_users) < share
        group_U = rng.integers(GROUPS, size=num_users)
        counts = {True: _Counts(), False: _Counts()}
        while True:
            for user in rng.integers(num_users, size=100):
                arm = bool(in_canary_U[user])
                rate = clicks_U[user] * (relative if arm else 1.0)
                counts[arm].add(int(group_U[user]), int(rng.binomial(SLATE, rate)))
            found = judge(counts[False].evidence(), counts[True].evidence(), GATE)
            if found.action != "wait":
                ends[found.action] += 1
                break
    return ends


class _Counts:
    def __init__(self) -> None:
        self.impressions = 0
        self.shown_G = np.zeros(GROUPS, np.int64)
        self.clicked_G = np.zeros(GROUPS, np.int64)

    def add(self, group: int, clicked: int) -> None:
        self.impressions += 1
        self.shown_G[group] += SLATE
        self.clicked_G[group] += clicked

    def evidence(self) -> Evidence:
        return Evidence(self.impressions, 0, 0, 10.0, self.impressions, self.shown_G, self.clicked_G)


def test_equal_canaries_are_rolled_back_at_most_once_in_twenty_under_repeated_looks() -> None:
    ends = outcomes(1.0, trials=100, seed=1)
    assert ends["rollback"] <= 5, ends


def test_canaries_that_lose_two_fifths_of_the_clicks_are_promoted_at_most_once_in_twenty() -> None:
    ends = outcomes(0.6, trials=60, seed=2)
    assert ends["promote"] <= 3, ends


def test_bound_holds_at_all_looks_at_once_for_a_share_exactly_at_its_limit() -> None:
    # The champion never misses; the canary misses just as often as is allowed. Looks after every request.
    rng = np.random.default_rng(3)
    condemned = 0
    for _ in range(200):
        misses_T = np.cumsum(rng.random(1200) < GATE.max_error_share)
        for count in range(20, 1200, 7):
            seen = evidence(0.15, count, below_top=int(misses_T[count - 1]))
            if judge(replace(NO_EVIDENCE, requests=100_000), replace(seen, impressions=0), GATE).action == "rollback":
                condemned += 1
                break
    assert condemned <= 10
