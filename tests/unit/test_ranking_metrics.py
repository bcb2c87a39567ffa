"""Figures of rankings, by hand and against scikit-learn."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import ndcg_score, roc_auc_score

from training.ranking_metrics import (
    bootstrap_interval,
    half_tie_rank,
    hit_rates,
    ndcgs,
    reciprocal_ranks,
    slate_figures,
)


def test_rank_counts_those_above_and_half_of_those_that_tie() -> None:
    scores_N = np.array([1.0, 3.0, 2.0, 2.0, 2.0])
    assert [half_tie_rank(scores_N, index) for index in range(5)] == [5.0, 1.0, 3.0, 3.0, 3.0]


def test_constant_scores_rank_every_answer_in_the_middle() -> None:
    assert {half_tie_rank(np.zeros(9), index) for index in range(9)} == {5.0}


def test_an_answer_without_a_number_never_ranks_above_one_with_a_number() -> None:
    assert half_tie_rank(np.array([np.nan, -5.0, np.nan]), 0) == 2.5
    assert half_tie_rank(np.array([np.nan, -5.0, np.nan]), 1) == 1.0


def test_figures_of_ranks_by_hand() -> None:
    ranks_E = np.array([1.0, 2.0, 10.0, 10.5, np.inf])
    assert hit_rates(ranks_E).tolist() == [1, 1, 1, 0, 0]
    assert ndcgs(ranks_E) == pytest.approx([1, 1 / np.log2(3), 1 / np.log2(11), 0, 0])
    assert reciprocal_ranks(ranks_E) == pytest.approx([1, 0.5, 0.1, 1 / 10.5, 0])


def test_slate_figures_by_hand() -> None:
    found = slate_figures(np.array([0.9, 0.8, 0.1, 0.5]), np.array([False, True, True, False]))
    assert found.auc == 0.25  # of four pairs only 0.8 over 0.5 is right
    assert found.mrr == pytest.approx((1 / 2 + 1 / 4) / 2)
    ideal = 1 + 1 / np.log2(3)
    assert found.ndcg_5 == found.ndcg_10 == pytest.approx((1 / np.log2(3) + 1 / np.log2(5)) / ideal)


slates = st.lists(st.tuples(st.integers(-20, 20), st.booleans()), min_size=2, max_size=30).filter(
    lambda slate: len({clicked for _, clicked in slate}) == 2
)


@given(slates)
def test_auc_is_that_of_scikit_learn_with_ties_or_without(slate: list[tuple[int, bool]]) -> None:
    scores_N = np.array([score for score, _ in slate], dtype=np.float64)
    clicked_N = np.array([clicked for _, clicked in slate])
    assert slate_figures(scores_N, clicked_N).auc == pytest.approx(roc_auc_score(clicked_N, scores_N))


@given(slates, st.integers(0, 2**32 - 1))
def test_ndcg_is_that_of_scikit_learn_where_nothing_ties(slate: list[tuple[int, bool]], seed: int) -> None:
    scores_N = np.random.default_rng(seed).permutation(len(slate)).astype(np.float64)
    clicked_N = np.array([clicked for _, clicked in slate])
    found = slate_figures(scores_N, clicked_N)
    assert found.ndcg_5 == pytest.approx(ndcg_score([clicked_N.astype(float)], [scores_N], k=5))
    assert found.ndcg_10 == pytest.approx(ndcg_score([clicked_N.astype(float)], [scores_N], k=10))


@pytest.mark.parametrize("clicked", [[True, True], [False, False]])
def test_a_slate_of_one_kind_has_no_figures(clicked: list[bool]) -> None:
    with pytest.raises(ValueError, match="was not"):
        slate_figures(np.array([1.0, 2.0]), np.array(clicked))


def test_interval_is_that_of_the_normal_distribution_for_many_values() -> None:
    values_E = np.random.default_rng(1).normal(3.0, 2.0, size=2000)
    found = bootstrap_interval(values_E, resamples=2000)
    reach = 1.96 * values_E.std() / np.sqrt(len(values_E))
    assert found.mean == pytest.approx(values_E.mean())
    assert found.low == pytest.approx(values_E.mean() - reach, abs=0.1 * reach)
    assert found.high == pytest.approx(values_E.mean() + reach, abs=0.1 * reach)


def test_interval_over_clusters_is_wider_where_their_members_agree() -> None:
    values_E = np.repeat(np.random.default_rng(2).normal(size=50), 20)
    single, whole = bootstrap_interval(values_E), bootstrap_interval(values_E, np.repeat(np.arange(50), 20).tolist())
    assert whole.high - whole.low > 3 * (single.high - single.low)


def test_same_seed_same_interval() -> None:
    values_E = np.random.default_rng(3).random(40)
    assert bootstrap_interval(values_E, seed=5) == bootstrap_interval(values_E, seed=5)
    assert bootstrap_interval(values_E, seed=5) != bootstrap_interval(values_E, seed=6)


def test_no_values_have_no_mean() -> None:
    assert np.isnan(bootstrap_interval(np.zeros(0)).mean)
