"""Who may serve: an equal or better challenger, and none that is poisoned."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from tailrace.ids import ItemId
from tailrace.settings import GateSettings
from tests.made_up_slates import make_example
from training.evaluate import Evaluation, evaluate
from training.examples import Example
from training.gate import LEAST_NEW_PLACES, LEAST_RANKED, Verdict, decide
from training.popularity import Popularity

Scores = list[NDArray[np.float64]]

SHOWN, CANDIDATES, CATALOGUE = 8, 12, 80
SETTINGS, NO_WORSE = GateSettings(), GateSettings(better_confidence=0.0)
SOUND = 1.02  # times as long as the champion takes


class Log:
    """Slates whose clicks follow hidden worth: what the item is worth to all, and what it is to this reader.

    A tenth of the items is new. `popular_N` is what counting clicks in the past would say.
    """

    def __init__(self, count: int, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        quality_I = rng.normal(scale=0.5, size=CATALOGUE)
        new_I = np.arange(CATALOGUE) % 10 == 0
        popular_I = np.where(new_I, 0.0, np.exp(quality_I) * 100)
        self.examples: list[Example] = []
        self.worths: Scores = []
        self.guesses: Scores = []
        self.popular: Scores = []
        for number in range(count):
            items = rng.choice(CATALOGUE, size=CANDIDATES, replace=False)
            worth_N = quality_I[items] + rng.normal(scale=1.5, size=CANDIDATES)
            guess_N = worth_N + rng.normal(scale=1.0, size=CANDIDATES)
            shown_first = np.argsort(-guess_N, kind="stable")
            items, worth_N, guess_N = items[shown_first], worth_N[shown_first], guess_N[shown_first]
            clicked = rng.random(SHOWN) < 1 / (1 + np.exp(1.5 - 1.5 * worth_N[:SHOWN]))
            self.examples.append(
                make_example(
                    clicked.tolist(),
                    unshown=CANDIDATES - SHOWN,
                    items=[f"i{item}" for item in items],
                    number=number,
                )
            )
            self.worths.append(worth_N)
            self.guesses.append(guess_N)
            self.popular.append(popular_I[items])
        old = {ItemId(f"i{item}"): int(popular_I[item]) for item in range(CATALOGUE) if not new_I[item]}
        self.popularity = Popularity(dict.fromkeys(old, 1000), old)

    def judge(self, scores: Scores) -> Evaluation:
        return evaluate(self.examples, scores, popularity=self.popularity, bootstrap=50)

    def verdict(self, scores: Scores, latency_ratio: float = SOUND, gate: GateSettings = SETTINGS) -> Verdict:
        """On a challenger with these scores, against the champion that made the slates."""
        return decide(self.judge(self.guesses), self.judge(scores), latency_ratio, gate)


@pytest.fixture(scope="module")
def log() -> Log:
    return Log(600)


def failed(verdict: Verdict) -> set[str]:
    return {check.name for check in verdict.checks if not check.passed}


def test_an_equal_challenger_is_promoted_where_better_is_not_asked_for(log: Log) -> None:
    verdict = log.verdict(log.guesses, gate=NO_WORSE)
    assert verdict.promoted and not failed(verdict)
    assert [reason.partition(" ")[0] for reason in verdict.reasons] == ["NDCG@10"]
    assert failed(log.verdict(log.guesses)) == {"better"}


@pytest.mark.parametrize("noise", [1e-3, 0.01, 0.05])
def test_noise_seldom_seems_better(noise: float) -> None:
    # A challenger that has learned nothing orders nearly as its parent does: one in ten may seem better.
    promoted = 0
    for seed in range(30):
        small, rng = Log(150, seed=seed), np.random.default_rng(seed)
        noised = [guess + rng.normal(scale=noise, size=CANDIDATES) for guess in small.guesses]
        promoted += small.verdict(noised).promoted
    assert promoted <= 7


def test_a_better_challenger_is_promoted(log: Log) -> None:
    verdict = log.verdict(log.worths)
    assert verdict.promoted
    ndcg = next(check for check in verdict.checks if check.name == "ndcg_10")
    assert ndcg.figure > 0.02


def test_a_log_in_which_clicks_follow_from_nothing_promotes_nobody(log: Log) -> None:
    rng = np.random.default_rng(0)
    champion, equal = log.judge(log.guesses), log.judge([guess + 1e-3 for guess in log.guesses])
    usual = champion.figures["auc"].mean
    broken = Log(600)
    for index, one in enumerate(broken.examples):  # feedback joined to the wrong items of the slate
        order = np.concatenate([rng.permutation(SHOWN), np.arange(SHOWN, CANDIDATES)])
        clicked, gains = one.clicked_N[order], one.gains_N[order]
        broken.examples[index] = replace(one, clicked_N=clicked, gains_N=gains)
    same = broken.judge(broken.guesses)
    assert usual > 0.6
    assert decide(champion, equal, SOUND, NO_WORSE, usual_auc=usual).promoted
    assert failed(decide(same, same, SOUND, NO_WORSE, usual_auc=usual)) == {"log tells"}
    assert decide(same, same, SOUND, NO_WORSE).promoted, "nothing is known of what was usual"
    # A champion that has lost its touch is replaced by one that has found it.
    lost = log.judge([rng.normal(size=CANDIDATES) for _ in log.examples])
    assert "log tells" not in failed(decide(lost, log.judge(log.worths), SOUND, SETTINGS, usual_auc=usual))


def test_the_scale_of_the_scores_makes_no_difference(log: Log) -> None:
    assert log.verdict([100 * worth - 7 for worth in log.worths]).promoted


def nan_somewhere(log: Log) -> Scores:
    scores = [worth.copy() for worth in log.worths]
    scores[17][3] = np.nan
    return scores


def infinity_somewhere(log: Log) -> Scores:
    scores = [worth.copy() for worth in log.worths]
    scores[5][0] = np.inf
    return scores


def all_nan(log: Log) -> Scores:
    return [np.full(CANDIDATES, np.nan)] * len(log.examples)


def constant(log: Log) -> Scores:
    return [np.full(CANDIDATES, 0.25)] * len(log.examples)


def nearly_constant(log: Log) -> Scores:
    return [1e-5 * worth for worth in log.worths]


def shuffled_labels(log: Log) -> Scores:
    rng = np.random.default_rng(8)
    return [rng.permutation(worth) for worth in log.worths]


def half_forgotten(log: Log) -> Scores:
    rng = np.random.default_rng(9)
    return [0.5 * guess + rng.normal(size=CANDIDATES) for guess in log.guesses]


def against_the_clicks(log: Log) -> Scores:
    return [-guess for guess in log.guesses]


def popularity_only(log: Log) -> Scores:
    return log.popular


POISONS: dict[Callable[[Log], Scores], set[str]] = {
    nan_somewhere: {"finite scores"},
    infinity_somewhere: {"finite scores"},
    all_nan: {"finite scores", "score spread", "ndcg_10"},
    constant: {"score spread", "ndcg_10"},
    nearly_constant: {"score spread"},
    shuffled_labels: {"ndcg_10"},
    half_forgotten: {"ndcg_10"},
    against_the_clicks: {"ndcg_10"},
    popularity_only: {"ndcg_10", "popular items", "new items"},
}


@pytest.mark.parametrize("poison", POISONS)
def test_a_poisoned_challenger_is_stopped_by_the_check_made_for_it(log: Log, poison: Callable[[Log], Scores]) -> None:
    verdict = log.verdict(poison(log))
    assert not verdict.promoted
    assert POISONS[poison] <= failed(verdict)
    assert len(verdict.reasons) == len(failed(verdict))


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("poison", [shuffled_labels, constant, popularity_only, against_the_clicks])
def test_a_poison_is_stopped_on_a_small_holdout_too(poison: Callable[[Log], Scores], seed: int) -> None:
    small = Log(60, seed=100 + seed)
    assert not small.verdict(poison(small)).promoted


def test_popularity_is_stopped_even_where_its_ndcg_would_pass(log: Log) -> None:
    verdict = log.verdict(popularity_only(log), gate=GateSettings(margin=1.0))
    assert not verdict.promoted and {"popular items", "new items"} <= failed(verdict)


def test_a_challenger_that_buries_new_items_is_stopped(log: Log) -> None:
    buried = [
        worth - 9.0 * np.array([item_id not in log.popularity.shown for item_id in example.item_ids])
        for example, worth in zip(log.examples, log.worths, strict=True)
    ]
    assert "new items" in failed(log.verdict(buried, gate=GateSettings(margin=1.0)))


def test_too_few_new_items_to_tell_are_said_to_be_so() -> None:
    few = Log(LEAST_NEW_PLACES)
    check = next(check for check in few.verdict(popularity_only(few)).checks if check.name == "new items")
    assert check.passed and "too few to compare" in check.text


def test_too_few_slates_promote_nobody() -> None:
    few = Log(LEAST_RANKED - 1)
    assert "enough slates" in failed(few.verdict(few.guesses))


def test_slates_without_a_gain_tell_nothing() -> None:
    examples = [make_example([0, 0, 0], number=number) for number in range(50)]
    scores = [np.array([3.0, 2.0, 1.0])] * 50
    silent = evaluate(examples, scores, popularity=Popularity({}, {}), bootstrap=10)
    verdict = decide(silent, silent, SOUND, SETTINGS)
    assert failed(verdict) == {"enough slates", "ndcg_10"} and any(
        "no slate can tell" in reason for reason in verdict.reasons
    )


@pytest.mark.parametrize("latency_ratio", [1.6, float("nan")])
def test_a_bundle_that_is_slow_is_stopped_however_good(log: Log, latency_ratio: float) -> None:
    assert failed(log.verdict(log.worths, latency_ratio)) == {"latency"}


def test_every_check_says_its_figure_and_its_bound(log: Log) -> None:
    verdict = log.verdict(log.worths)
    assert [check.name for check in verdict.checks] == [
        "enough slates",
        "finite scores",
        "score spread",
        "log tells",
        "ndcg_10",
        "better",
        "popular items",
        "new items",
        "latency",
    ]
    assert all(check.passed for check in verdict.checks)
    assert "1.02, at most 1.50" in verdict.checks[-1].text


def test_models_judged_on_different_examples_are_an_error(log: Log) -> None:
    other = Log(600, seed=1)
    with pytest.raises(ValueError, match="different examples"):
        decide(log.judge(log.guesses), other.judge(other.guesses), SOUND, SETTINGS)


@settings(deadline=None, max_examples=40)
@given(
    row=st.integers(0, 39),
    column=st.integers(0, CANDIDATES - 1),
    bad=st.sampled_from([np.nan, np.inf, -np.inf]),
    noise=st.floats(0, 100),
    seed=st.integers(0, 1000),
)
def test_adding_noise_never_turns_a_score_that_is_no_number_into_a_pass(
    row: int, column: int, bad: float, noise: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    scores = [worth + noise * rng.normal(size=CANDIDATES) for worth in SMALL.worths]
    scores[row][column] = bad
    verdict = decide(SMALL_CHAMPION, SMALL.judge(scores), SOUND, GateSettings(margin=1.0, bootstrap=20))
    assert "finite scores" in failed(verdict) and not verdict.promoted


SMALL = Log(40, seed=2)
SMALL_CHAMPION = SMALL.judge(SMALL.guesses)
