"""What is known of tastes is learned from slates and clicks: of made-up users, whose tastes are known."""

from dataclasses import replace

import numpy as np
import pytest

from tailrace.ids import UserId
from tailrace.tastes import TasteModel, bucket, make_tastes
from tests.made_up_slates import make_example
from training.examples import Example
from training.taste_model import fit_taste_model

TAGS = ("castles", "ghosts", "ships", "storms", "news")
# Whoever likes castles likes ghosts, and dislikes ships; news are the same to all, and worth more than the rest.
MEAN_T = np.array([0.0, 0.0, 0.0, 0.0, 1.0])
COVARIANCE_TT = np.array(
    [[1.5, 1.2, -0.8, 0.0, 0.0], [1.2, 1.5, -0.8, 0.0, 0.0], [-0.8, -0.8, 1.5, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0, 0.0],
     [0.0, 0.0, 0.0, 0.0, 0.01]]
)  # fmt: skip
SEEN_K = 1 / np.sqrt(1 + np.arange(6))


def make_examples(users: int, slates: int, *, level: float = -2.0, seed: int = 0) -> list[Example]:
    """Slates of six items with one or two tags each, clicked as their users' tastes say, where they are looked at."""
    rng = np.random.default_rng(seed)
    made = []
    for user in range(users):
        taste_T = rng.multivariate_normal(MEAN_T, COVARIANCE_TT)
        for _ in range(slates):
            held_NT = np.zeros((6, len(TAGS)))
            for row in held_NT:
                row[rng.choice(len(TAGS), size=rng.integers(1, 3), replace=False)] = 1
            worth_N = held_NT @ taste_T / np.sqrt(held_NT.sum(1))
            clicked_N = rng.random(6) < SEEN_K / (1 + np.exp(-level - worth_N))
            tags_N = [[tag for tag, held in zip(TAGS, row, strict=True) if held] for row in held_NT]
            one = make_example(clicked_N.tolist())
            made.append(replace(one, user_id=UserId(f"u{user}"), tastes=make_tastes({}, tags_N)))
    return made


def in_order(model: TasteModel) -> tuple[np.ndarray, np.ndarray]:
    rows = [model.known_T.tolist().index(bucket(tag)) for tag in TAGS]
    return model.mean_T[rows], model.covariance_TT[np.ix_(rows, rows)]


def test_mean_and_covariance_of_tastes_are_found() -> None:
    found = fit_taste_model(make_examples(300, 40), SEEN_K, TasteModel.ignorant())
    assert found is not None and found.gain == 1.0
    mean_T, covariance_TT = in_order(found)
    np.testing.assert_allclose(mean_T, MEAN_T, atol=0.3)
    # Of clicks and no clicks alone, how much tastes differ is known less well than how they go together.
    spread_T, true_spread_T = (np.sqrt(np.diag(of_TT)) for of_TT in (covariance_TT, COVARIANCE_TT))
    np.testing.assert_allclose(spread_T[:4], true_spread_T[:4], rtol=0.3)
    together_TT = covariance_TT / np.outer(spread_T, spread_T)
    np.testing.assert_allclose(
        together_TT[:4, :4], (COVARIANCE_TT / np.outer(true_spread_T, true_spread_T))[:4, :4], atol=0.25
    )
    np.testing.assert_allclose(covariance_TT, covariance_TT.T)
    assert np.linalg.eigvalsh(found.covariance_TT).min() > 0


def test_usual_click_rate_of_a_tag_is_that_of_somebody_of_whom_nothing_is_known() -> None:
    found = fit_taste_model(make_examples(300, 20), SEEN_K, TasteModel.ignorant())
    assert found is not None
    rates = dict(zip(found.known_T.tolist(), found.rate_T.tolist(), strict=True))
    usual = [SEEN_K.mean() / (1 + np.exp(2.0 - worth)) for worth in (0, 1)]  # of items without news, and of news alone
    assert 0.8 * usual[0] < rates[bucket("castles")] < rates[bucket("news")] < usual[1]
    assert ((found.information_T > 0) & (found.information_T < found.rate_T)).all()


@pytest.mark.parametrize(("clicked", "level"), [(1.0, -4.0), (0.75, -4.0), (0.75, -3.0), (0.35, -4.0)])
def test_one_who_clicks_nearly_everything_does_not_upset_what_is_known_of_the_rest(
    clicked: float, level: float
) -> None:
    usual = make_examples(60, 6, level=level, seed=1)
    rng = np.random.default_rng(0)
    fan = [
        replace(one, user_id=UserId("fan"), clicked_N=rng.random(6) < clicked) for one in make_examples(1, 20, seed=2)
    ]
    found, without = (fit_taste_model(of, SEEN_K, TasteModel.ignorant()) for of in (usual + fan, usual))
    assert found is not None and without is not None
    assert np.linalg.eigvalsh(found.covariance_TT).min() > 0
    assert np.abs(in_order(found)[1] - in_order(without)[1]).max() < 1.5


def test_of_a_user_of_many_slates_the_newest_count() -> None:
    def slates(first_ms: int, tag: str) -> list[Example]:
        made = make_examples(1, 120, seed=4)
        tastes = make_tastes({}, [[tag]] * 6)
        return [replace(one, at_ms=first_ms + number, tastes=tastes) for number, one in enumerate(made)]

    found = fit_taste_model(slates(1000, "new") + slates(0, "old"), SEEN_K, TasteModel.ignorant())
    assert found is not None
    rates = dict(zip(found.known_T.tolist(), found.rate_T.tolist(), strict=True))
    assert rates[bucket("old")] == pytest.approx(float(np.mean(list(rates.values()))), rel=1e-3)  # as of any tag


def test_little_evidence_leaves_it_near_what_the_parent_knew() -> None:
    parent = fit_taste_model(make_examples(300, 20), SEEN_K, TasteModel.ignorant())
    assert parent is not None
    few = make_examples(2, 2, seed=5)
    onward, anew = (fit_taste_model(few, SEEN_K, one) for one in (parent, TasteModel.ignorant()))
    assert onward is not None and anew is not None
    assert np.abs(in_order(onward)[1] - in_order(parent)[1]).max() < 0.3
    assert abs(in_order(anew)[1][0, 1]) < 0.2  # of castles and ghosts nothing was to be learned


def test_tags_that_are_shown_no_more_stay_known() -> None:
    parent = fit_taste_model(make_examples(100, 10), SEEN_K, TasteModel.ignorant())
    assert parent is not None
    others = [replace(one, tastes=make_tastes({}, [["chess"]] * 6)) for one in make_examples(50, 4, seed=3)]
    found = fit_taste_model(others, SEEN_K, parent)
    assert found is not None
    assert set(found.known_T.tolist()) == {bucket(tag) for tag in (*TAGS, "chess")}
    np.testing.assert_allclose(in_order(found)[1], in_order(parent)[1], atol=0.05)


@pytest.mark.parametrize("clicked", [False, True])
def test_where_all_or_nothing_was_clicked_nothing_is_learned(clicked: bool) -> None:
    examples = [replace(one, clicked_N=np.full(6, clicked)) for one in make_examples(5, 2)]
    assert fit_taste_model(examples, SEEN_K, TasteModel.ignorant()) is None


def test_same_examples_give_the_same_model_to_the_bit() -> None:
    one, other = (fit_taste_model(make_examples(20, 5), SEEN_K, TasteModel.ignorant()) for _ in range(2))
    assert one is not None and other is not None
    np.testing.assert_array_equal(one.covariance_TT, other.covariance_TT)
