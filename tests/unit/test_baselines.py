"""The rules and rankers we are measured against, by hand where a hand can follow."""

import numpy as np
import pytest

from tailrace.ids import ItemId, ModelVersion, RequestId, UserId
from tailrace.tastes import no_tastes
from training.baselines import DecayedCounts, LambdaRank, PopularityRules, TfIdf, by_root_of_age
from training.examples import Example

HOUR_MS = 3_600_000


def rows(*numbers: int) -> np.ndarray:
    return np.array(numbers, dtype=np.int64)


def test_counts_lose_one_part_in_e_in_every_time_constant() -> None:
    counts = DecayedCounts(3600.0)
    counts.add(0, 0)
    counts.add(0, HOUR_MS)
    counts.add(1, HOUR_MS)
    found = counts.at(rows(0, 1, 2, 5000), 2 * HOUR_MS)
    assert found == pytest.approx([np.exp(-2) + np.exp(-1), np.exp(-1), 0, 0])


def test_without_decay_counts_are_plain() -> None:
    counts = DecayedCounts(np.inf)
    for at_ms in range(5):
        counts.add(3000, at_ms)
    assert counts.at(rows(3000, 1), 10**15).tolist() == [5, 0]


def test_popularity_is_divided_by_the_root_of_the_softened_age() -> None:
    found = by_root_of_age(np.array([4.0, 4.0, 0.0]), np.array([6340.0, 0.0, 60.0]), 60.0)
    assert found == pytest.approx([4 / 80, 4 / np.sqrt(60), 0])


def test_each_rule_orders_by_what_it_is_named_for() -> None:
    rules = PopularityRules()
    for _ in range(6):
        rules.learn(0, 0, first_touch=False)  # loved long ago, by one
    for hour in (40, 41):
        rules.learn(1, hour * HOUR_MS, first_touch=True)  # two of late
    for _ in range(3):
        rules.learn(2, 41 * HOUR_MS, first_touch=False)  # three of late, all by one
    rules.learn(3, 42 * HOUR_MS, first_touch=True)  # the newest
    scores = rules.scores(rows(0, 1, 2, 3), 42 * HOUR_MS + 1000, np.random.default_rng(0))
    best = {name: int(np.argmax(scores_N)) for name, scores_N in scores.items()}
    assert best["all-time popularity"] == 0
    assert best["popularity, 6 h"] == 2
    assert best["unique users, 2 h"] == 3
    assert best["newest first"] == best["popularity, 6 h, by root of age to the minute"] == 3
    assert len(set(scores["random"].tolist())) == 4


def slate(seed: int) -> Example:
    """Returns a choice of the one candidate whose second feature is in the middle: no linear rule finds it."""
    rng = np.random.default_rng(seed)
    features_NF = rng.normal(size=(30, 3)).astype(np.float32)
    taken_N = np.arange(30) == np.abs(features_NF[:, 1]).argmin()
    nothing_N = np.full(30, np.nan, dtype=np.float32)
    return Example(
        request_id=RequestId(f"r{seed}"),
        user_id=UserId("u"),
        at_ms=seed,
        model_version=ModelVersion("v"),
        user_text="",
        item_ids=tuple(ItemId(str(index)) for index in range(30)),
        texts=("",) * 30,
        num_shown=30,
        features_NF=features_NF,
        tastes=no_tastes(30),
        scores_N=nothing_N,
        propensities_N=nothing_N,
        gains_N=taken_N.astype(np.float32),
        clicked_N=taken_N,
        ratings_N=nothing_N,
    )


def test_lambdarank_finds_what_no_linear_rule_finds() -> None:
    model = LambdaRank(rounds=60).fit([slate(seed) for seed in range(200)])
    tests = [slate(seed) for seed in range(1000, 1050)]
    first = [int(np.argmax(model.scores(one.features_NF))) == int(np.argmax(one.clicked_N)) for one in tests]
    assert np.mean(first) > 0.5


def test_lambdarank_is_the_same_for_the_same_seed() -> None:
    slates = [slate(seed) for seed in range(60)]
    one, other = (LambdaRank(rounds=10, seed=3).fit(slates).scores(slates[0].features_NF) for _ in range(2))
    assert one.tolist() == other.tolist()


def test_lambdarank_says_what_it_lacks() -> None:
    with pytest.raises(ValueError, match="nothing yet"):
        LambdaRank().scores(np.zeros((2, 3), dtype=np.float32))
    with pytest.raises(ValueError, match="too few"):
        LambdaRank().fit([slate(0)])


def test_tf_idf_prefers_shared_rare_words() -> None:
    texts = ["the lantern of the harbour", "the harbour at night", "gardens at night", "lantern makers"]
    scores_N = TfIdf(texts).scores([texts[0]], [texts[0], texts[1], texts[2]])
    assert scores_N[0] == pytest.approx(1.0)
    assert scores_N[0] > scores_N[1] > scores_N[2] == 0
