"""What another policy would have earned: held against a small world where that is known exactly, and the town."""

from dataclasses import dataclass, replace
from itertools import permutations

import numpy as np
import pytest
from numpy.typing import NDArray

from deploy.demo import load_books
from services.slate import build_slate, place_probabilities
from tailrace.errors import TooLittleOverlap
from tailrace.settings import SlateSettings
from tailrace.world import World
from tests.made_up_slates import make_example
from training.exploration import without_exploration
from training.off_policy import LoggedSlates, OffPolicy, estimate, logged_slates, target_probabilities

Reals = NDArray[np.float64]
Ranks = NDArray[np.int64]

READERS, ITEMS, PLACES = 12, 6, 4
LOGS, SLATES = 500, 1000


@dataclass(frozen=True)
class Log:
    """What was logged; the target's chances; the true joy in each item logged, and in what the target might show."""

    slates: LoggedSlates
    target_EK: Reals
    joy_EK: Reals
    hoped_EK: Reals

    def part(self, rows: slice) -> "Log":
        slates = self.slates
        cut = LoggedSlates(slates.clicks_EK[rows], slates.propensities_EK[rows], slates.shown_EK[rows])
        return Log(cut, self.target_EK[rows], self.joy_EK[rows], self.hoped_EK[rows])


@dataclass(frozen=True)
class SmallWorld:
    """Readers who look from the top down; after a click they look half as much, so what stands above matters.

    Both policies take the best item left by their own ranks, or another by lot, as `services.slate` does.
    """

    joy_RI: Reals
    logging_RI: Ranks
    target_RI: Ranks
    exploration: float
    target_exploration: float

    def log(self, slates: int, seed: int) -> Log:
        rng = np.random.default_rng(seed)
        readers_E, rows = rng.integers(0, READERS, size=slates), np.arange(slates)
        left_EI = np.ones((slates, ITEMS), dtype=np.bool_)
        looks_E = np.ones(slates)
        clicks_EK, logged_EK, target_EK, joy_EK, hoped_EK = (np.zeros((slates, PLACES)) for _ in range(5))
        for place in range(PLACES):
            own_EI = self._chances(self.logging_RI[readers_E], left_EI, self.exploration)
            other_EI = self._chances(self.target_RI[readers_E], left_EI, self.target_exploration)
            item_E = (own_EI.cumsum(1) <= rng.random(slates)[:, None]).sum(1).clip(0, ITEMS - 1)
            logged_EK[:, place], target_EK[:, place] = own_EI[rows, item_E], other_EI[rows, item_E]
            joy_EK[:, place] = self.joy_RI[readers_E, item_E]
            hoped_EK[:, place] = (other_EI * self.joy_RI[readers_E]).sum(1)
            clicked_E = rng.random(slates) < looks_E * joy_EK[:, place]
            clicks_EK[:, place] = clicked_E
            looks_E = np.where(clicked_E, looks_E / 2, looks_E)
            left_EI[rows, item_E] = False
        return Log(LoggedSlates(clicks_EK, logged_EK, np.ones_like(left_EI[:, :PLACES])), target_EK, joy_EK, hoped_EK)

    def truth(self) -> float:
        """The target's click rate, over every slate it can make and every way to click."""
        total = 0.0
        for slate in permutations(range(ITEMS), PLACES):
            chance_R, left = np.ones(READERS), list(range(ITEMS))
            clicks_RC = np.eye(PLACES + 1)[np.zeros(READERS, np.int64)]  # chance of so many clicks so far
            for item in slate:
                ahead_R = (self.target_RI[:, left] < self.target_RI[:, [item]]).sum(1)
                chance_R = chance_R * place_probabilities(len(left), self.target_exploration, ITEMS)[ahead_R]
                more_RC = clicks_RC * 0.5 ** np.arange(PLACES + 1) * self.joy_RI[:, [item]]
                clicks_RC = clicks_RC - more_RC + np.roll(more_RC, 1, axis=1)
                left.remove(item)
            total += float((chance_R * (clicks_RC @ np.arange(PLACES + 1))).mean())
        return total / PLACES

    @staticmethod
    def _chances(ranks_EI: Ranks, left_EI: NDArray[np.bool_], exploration: float) -> Reals:
        left = int(left_EI[0].sum())
        by_rank = np.append(place_probabilities(left, exploration, ITEMS), np.zeros(ITEMS - left))
        result: Reals = by_rank[np.argsort(np.argsort(np.where(left_EI, ranks_EI, ITEMS), axis=1), axis=1)]
        return result


def small_world(*, exploration: float = 0.3, likeness: float = 0.9, seed: int = 3) -> SmallWorld:
    """Returns a world whose target knows the readers' joys better than the logging policy; 1 makes them like."""
    rng = np.random.default_rng(seed)
    taste_RI = rng.normal(size=(READERS, ITEMS))
    guess_RI = likeness * taste_RI + (1 - likeness) * rng.normal(size=(READERS, ITEMS))
    return SmallWorld(
        joy_RI=1 / (1 + np.exp(2.0 - taste_RI)),
        logging_RI=np.argsort(np.argsort(-guess_RI, axis=1), axis=1),
        target_RI=np.argsort(np.argsort(-taste_RI, axis=1), axis=1),
        exploration=exploration,
        target_exploration=0.15,
    )


@pytest.fixture(scope="module")
def simulated() -> tuple[float, list[OffPolicy], list[OffPolicy]]:
    """The truth, and what 500 logs say of it: without and with a reward model, which is the joys less a fifth."""
    world = small_world()
    whole = world.log(LOGS * SLATES, seed=11)
    logs = [whole.part(slice(start, start + SLATES)) for start in range(0, LOGS * SLATES, SLATES)]
    plain = [estimate(log.slates, log.target_EK) for log in logs]
    modelled = [
        estimate(log.slates, log.target_EK, predicted_EK=0.8 * log.joy_EK, expected_EK=0.8 * log.hoped_EK)
        for log in logs
    ]
    return world.truth(), plain, modelled


def values(found: list[OffPolicy], name: str) -> NDArray[np.float64]:
    return np.array([getattr(one, name).mean for one in found])


@pytest.mark.parametrize("name", ["ips", "snips", "doubly_robust", "modelled"])
def test_intervals_cover_the_truth_as_often_as_they_say(
    simulated: tuple[float, list[OffPolicy], list[OffPolicy]], name: str
) -> None:
    truth, plain, modelled = simulated
    estimates = [
        one.doubly_robust if name == "modelled" else getattr(one, name)
        for one in (modelled if name == "modelled" else plain)
    ]
    covered = np.mean([one.low <= truth <= one.high for one in estimates])
    assert 0.93 <= covered <= 0.97, covered


def test_the_estimates_are_right_on_average_where_the_logged_rate_is_not(
    simulated: tuple[float, list[OffPolicy], list[OffPolicy]],
) -> None:
    truth, plain, modelled = simulated
    for found in (values(plain, "ips"), values(plain, "doubly_robust"), values(modelled, "doubly_robust")):
        assert abs(found.mean() - truth) < 4 * found.std() / np.sqrt(LOGS)
    assert abs(values(plain, "snips").mean() - truth) < 0.001
    assert abs(values(plain, "logged").mean() - truth) > 0.004


def test_doubly_robust_varies_no_more_than_ips(simulated: tuple[float, list[OffPolicy], list[OffPolicy]]) -> None:
    _, plain, modelled = simulated
    assert values(plain, "doubly_robust").var() <= values(plain, "ips").var()
    assert values(modelled, "doubly_robust").var() <= values(plain, "ips").var()


def test_a_reward_model_that_is_wrong_does_no_harm_on_average() -> None:
    world = small_world()
    found = []
    for seed in range(60):
        log = world.log(SLATES, seed)
        nonsense = {"predicted_EK": 1 - log.joy_EK, "expected_EK": 1 - log.hoped_EK}
        found.append(estimate(log.slates, log.target_EK, **nonsense).doubly_robust.mean)
    assert abs(np.mean(found) - world.truth()) < 4 * np.std(found) / np.sqrt(len(found))


def test_a_policy_estimated_from_its_own_log_gets_the_logged_rate() -> None:
    log = small_world().log(300, seed=1)
    found = estimate(log.slates, log.slates.propensities_EK)
    rate = log.slates.clicks_EK.mean()
    assert found.effective_slates == pytest.approx(300) and found.mean_weight == 1
    for one in (found.logged, found.ips, found.snips, found.doubly_robust):
        assert one.mean == pytest.approx(rate)


def test_a_log_worth_too_few_slates_is_refused() -> None:
    log = small_world(likeness=0.5).log(SLATES, seed=1)
    with pytest.raises(TooLittleOverlap, match=r"1000 logged slates are worth .*: at least 100 are needed"):
        estimate(log.slates, log.target_EK)


def test_a_log_that_lacks_what_the_target_shows_is_refused_however_long() -> None:
    # Half the time the target shows what the log never did: the weights of the rest average a half.
    slates = 4000
    logged = LoggedSlates(np.zeros((slates, 1)), np.full((slates, 1), 0.5), np.ones((slates, 1), np.bool_))
    with pytest.raises(TooLittleOverlap, match="missing"):
        estimate(logged, np.full((slates, 1), 0.25))


def test_a_target_that_never_shows_what_was_logged_is_refused() -> None:
    logged = LoggedSlates(np.ones((200, 2)), np.full((200, 2), 0.5), np.ones((200, 2), np.bool_))
    with pytest.raises(TooLittleOverlap):
        estimate(logged, np.zeros((200, 2)))


@pytest.mark.parametrize("wrong", [0.0, -0.1, 1.1, float("nan")])
def test_chances_outside_their_range_are_an_error(wrong: float) -> None:
    shown = np.ones((200, 1), np.bool_)
    with pytest.raises(ValueError, match="propensity"):
        estimate(LoggedSlates(np.zeros((200, 1)), np.full((200, 1), wrong), shown), np.ones((200, 1)))
    if wrong != 0:
        with pytest.raises(ValueError, match="target"):
            estimate(LoggedSlates(np.zeros((200, 1)), np.ones((200, 1)), shown), np.full((200, 1), wrong))


def test_slates_of_several_lengths_count_each_by_its_own_items() -> None:
    examples = [
        make_example([1], propensities=[0.9], number=0),
        make_example([0, 1], propensities=[0.9, 0.5], unshown=2, number=1),
    ] * 100
    slates = logged_slates(examples)
    assert slates.clicks_EK.shape == (200, 2) and slates.shown_EK.sum() == 300
    target = target_probabilities(examples, lambda example: example.propensities_N[: example.num_shown])
    found = estimate(slates, target)
    for one in (found.logged, found.ips, found.snips, found.doubly_robust):
        assert one.mean == pytest.approx(0.75)


# -- the simulated town --------------------------------------------------------------------------------------------


CANDIDATES, SHOWN = 20, 3


def of_the_town(requests: int, exploration: float, pool: int, seed: int) -> tuple[LoggedSlates, Reals, float]:
    """Returns slates of the simulated town, made by one ranker; another's chances of them, and its true click rate.

    Both know what a reader likes up to an error, most of which they share, and explore alike.
    """
    rng = np.random.default_rng(seed)
    world = World(load_books(), seed=seed)
    readers = [world.reader(number) for number in range(60)]
    clicks_EK, own_EK, other_EK = (np.zeros((requests, SHOWN)) for _ in range(3))
    truth = 0.0
    for row in range(requests):
        reader = readers[int(rng.integers(len(readers)))]
        among = rng.choice(len(world.item_ids), size=CANDIDATES, replace=False)
        joy_N = world.attraction(reader, world.moment(3600.0 * row, rng))[among]
        seen_K = world.examination(reader, SHOWN)
        shared_N, own_N, other_N = rng.normal(size=(3, CANDIDATES))
        logging_N, target_N = (np.log(joy_N) + shared_N + error_N / 4 for error_N in (own_N, other_N))
        slate = show(logging_N, exploration, pool, rng)
        clicks_EK[row] = rng.random(SHOWN) < seen_K * joy_N[slate]
        own_EK[row], other_EK[row] = (chances(of, slate, exploration, pool) for of in (logging_N, target_N))
        truth += np.mean([seen_K @ joy_N[show(target_N, exploration, pool, rng)] for _ in range(4)]) / SHOWN
    return LoggedSlates(clicks_EK, own_EK, np.ones_like(clicks_EK, dtype=np.bool_)), other_EK, truth / requests


def show(scores_N: Reals, exploration: float, pool: int, rng: np.random.Generator) -> list[int]:
    slots = build_slate(
        scores_N,
        np.zeros((len(scores_N), 1)),
        [()] * len(scores_N),
        n=SHOWN,
        diversity=0.0,
        max_per_tag=0,
        exploration=exploration,
        explore_pool=pool,
        rng=rng,
    )
    return [slot.index for slot in slots]


def chances(scores_N: Reals, slate: list[int], exploration: float, pool: int) -> list[float]:
    left = np.argsort(-scores_N).tolist()
    found = []
    for index in slate:
        found.append(float(place_probabilities(len(left), exploration, pool)[left.index(index)]))
        left.remove(index)
    return found


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_in_the_town_every_estimate_of_another_ranker_holds_the_truth(seed: int) -> None:
    logged, target_EK, truth = of_the_town(3000, exploration=0.5, pool=CANDIDATES, seed=seed)
    found = estimate(logged, target_EK, confidence=0.99)
    assert found.effective_slates < 1500  # the two do differ
    for one in (found.ips, found.snips, found.doubly_robust):
        assert one.low < truth < one.high and one.high - one.low < truth


def test_at_the_exploration_that_is_shipped_another_ranker_is_refused() -> None:
    slate = SlateSettings()
    logged, target_EK, _ = of_the_town(1500, slate.exploration, slate.explore_pool, seed=0)
    with pytest.raises(TooLittleOverlap):
        estimate(logged, target_EK)


@pytest.mark.parametrize("exploration", [SlateSettings().exploration, 0.3])
def test_what_the_town_would_click_without_exploration_is_known(exploration: float) -> None:
    rng = np.random.default_rng(5)
    world = World(load_books(), seed=5)
    readers = [world.reader(number) for number in range(60)]
    examples, truth = [], []
    for row in range(6000):
        reader = readers[int(rng.integers(len(readers)))]
        among = rng.choice(len(world.item_ids), size=CANDIDATES, replace=False)
        joy_N = world.attraction(reader, world.moment(3600.0 * row, rng))[among]
        scores_N = np.log(joy_N) + rng.normal(size=CANDIDATES) / 4
        slate = show(scores_N, exploration, CANDIDATES, rng)
        seen_K = world.examination(reader, SHOWN)
        clicked = rng.random(SHOWN) < seen_K * joy_N[slate]
        propensities = chances(scores_N, slate, exploration, CANDIDATES)
        examples.append(make_example(clicked.tolist(), propensities=propensities, number=row))
        truth.append(seen_K @ joy_N[show(scores_N, 0.0, CANDIDATES, rng)] / SHOWN)
    unsound = [make_example([1, 1, 1], propensities=[what] * SHOWN) for what in (np.nan, 0.0, 1.5)]
    found = without_exploration([*examples, *unsound * 300])
    assert found.slates == len(examples)
    assert found.effective_slates == pytest.approx(len(examples) * (1 - exploration) ** SHOWN, rel=0.05)
    for one in (found.ips, found.snips, found.doubly_robust):
        assert one.low < np.mean(truth) < one.high
    assert found.gain.mean == pytest.approx(found.doubly_robust.mean - found.logged.mean)
    assert found.gain.high - found.gain.low < found.logged.high - found.logged.low  # of the same slates
    if exploration > 0.1:
        assert found.gain.low > 0  # what it costs is seen


def test_a_log_in_which_every_place_went_by_lot_does_not_know_the_first_choice() -> None:
    with pytest.raises(TooLittleOverlap):
        without_exploration([make_example([1, 0], propensities=[0.1, 0.1], number=row) for row in range(500)])


def test_a_lot_that_is_likelier_than_the_first_choice_is_told_from_it() -> None:
    rng = np.random.default_rng(6)
    lots = rng.random(2000) < 0.6
    examples = [
        replace(make_example([not lot], propensities=[0.6 if lot else 0.4], number=row), explored=(0,) * lot)
        for row, lot in enumerate(lots.tolist())
    ]
    found = without_exploration(examples)  # the first choice is always clicked, what the lot brings never
    assert found.ips.low < 1.0 < found.ips.high and found.snips.mean == pytest.approx(1.0)


def test_little_exploration_of_which_a_small_log_holds_nothing_is_no_sign_of_missing_slates() -> None:
    found = without_exploration([make_example([row % 2] * 10, propensities=[0.999] * 10) for row in range(200)])
    assert found.doubly_robust.mean == pytest.approx(0.5, abs=0.01)


def test_without_exploration_in_the_log_nothing_changes() -> None:
    found = without_exploration([make_example([row % 2, 0], number=row) for row in range(400)])
    assert found.doubly_robust.mean == found.logged.mean == 0.25 and found.effective_slates == 400
