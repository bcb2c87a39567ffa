"""Figures of scores on examples: held equal to scikit-learn's, with intervals, and made as serving scores."""

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.calibration import calibration_curve
from sklearn.metrics import f1_score, log_loss, ndcg_score, precision_score, recall_score, roc_auc_score
from sklearn.metrics.pairwise import cosine_similarity

from services.parts import Parts
from services.scorer import EncodedItems, Scorer
from tailrace.ids import ItemId
from tailrace.tastes import Floats, TasteModel, bucket, make_tastes
from tests.made_up_slates import make_example, make_examples
from tests.unit.conftest import FEATURE_NAMES as BUNDLE_FEATURES
from training.calibration import AS_SCORED, Platt, fit_platt
from training.evaluate import Evaluation, evaluate
from training.examination import fit_examination
from training.examples import Example
from training.judged_gains import Referee, judged_gains
from training.popularity import Popularity, count_popularity
from training.rescoring import ItemTable, encode_texts, latency_ratio, score_beside, score_examples
from training.slate_metrics import aucs, hits, line_up, ndcgs, reciprocal_ranks, retrieved

Scores = Sequence[NDArray[np.floating]]
NOTHING = Popularity({}, {})
NAN = float("nan")


def judge(examples: Sequence[Example], scores: Scores, **options: object) -> Evaluation:
    return evaluate(examples, scores, **({"popularity": NOTHING, "bootstrap": 200} | options))  # type: ignore[arg-type]


slate_lists = st.lists(
    st.lists(
        st.tuples(
            st.sampled_from([-2.0, -0.5, 0.0, 0.5, 0.25, 3.0]), st.sampled_from([0.0, 0.0, 1.0, 2.5]), st.booleans()
        ),
        min_size=1,
        max_size=13,
    ),
    min_size=1,
    max_size=6,
)


@settings(deadline=None, max_examples=60)
@given(slate_lists)
def test_figures_of_a_slate_equal_those_of_scikit_learn_with_ties_and_all(
    drawn: list[list[tuple[float, float, bool]]],
) -> None:
    columns = [tuple(np.array(column) for column in zip(*slate, strict=True)) for slate in drawn]
    slates = line_up(*zip(*columns, strict=True))
    for top in (3, 10):
        found_ndcg, found_auc = ndcgs(slates, top), aucs(slates)
        for row, (scores, gains, clicked) in enumerate(columns):
            if len(scores) > 1 and gains.any():
                assert found_ndcg[row] == pytest.approx(ndcg_score(gains[None], scores[None], k=top))
            else:
                assert np.isnan(found_ndcg[row])
            if 0 < clicked.sum() < len(clicked):
                assert found_auc[row] == pytest.approx(roc_auc_score(clicked, scores))
            else:
                assert np.isnan(found_auc[row])


def test_precision_recall_and_f1_equal_those_of_scikit_learn_where_nothing_ties() -> None:
    examples, worths = make_examples(60, unshown=0, seed=2)
    slates = line_up(worths, [one.gains_N for one in examples], [one.clicked_N for one in examples])
    found = retrieved(slates, 3)
    for row, (example, worth) in enumerate(zip(examples, worths, strict=True)):
        if not example.clicked_N.any():
            assert np.isnan([values[row] for values in found]).all()
            continue
        chosen = np.isin(np.arange(len(worth)), np.argsort(-worth)[:3])
        wanted = [score(example.clicked_N, chosen) for score in (precision_score, recall_score, f1_score)]
        assert [values[row] for values in found] == pytest.approx(wanted)


def test_a_reciprocal_rank_is_of_the_best_click_and_ties_take_the_middle() -> None:
    slates = line_up(
        [np.array([3.0, 2.0, 1.0]), np.array([1.0, 1.0, 1.0]), np.array([1.0, 2.0])],
        [np.zeros(3), np.zeros(3), np.zeros(2)],
        [np.array([False, True, True]), np.array([True, False, False]), np.array([False, False])],
    )
    np.testing.assert_allclose(reciprocal_ranks(slates), [1 / 2, 1 / 2, NAN])
    np.testing.assert_allclose(hits(slates, 1), [0, 0, NAN])
    np.testing.assert_allclose(hits(slates, 2), [1, 1, NAN])


def test_a_score_that_is_no_number_ranks_last() -> None:
    slates = line_up([np.array([NAN, -9.0, 1.0])], [np.array([1.0, 0, 0])], [np.array([True, False, False])])
    assert reciprocal_ranks(slates)[0] == pytest.approx(1 / 3) and aucs(slates)[0] == 0
    worst = make_example([1, 0, 0])
    assert judge([worst], [np.array([NAN, -9.0, 1.0])]).sanity.not_finite == 1


def test_constant_scores_earn_what_a_shuffled_order_earns_on_average() -> None:
    examples, _ = make_examples(200)
    constant = judge(examples, [np.zeros(len(one.texts)) for one in examples]).figures
    rng = np.random.default_rng(0)
    shuffled = np.mean(
        [judge(examples, [rng.random(len(one.texts)) for one in examples]).figures["ndcg_10"].mean for _ in range(30)]
    )
    assert constant["auc"].mean == 0.5
    assert constant["ndcg_10"].mean == pytest.approx(shuffled, abs=0.01)


def test_log_loss_is_that_of_scikit_learn_over_all_shown_items() -> None:
    examples, worths = make_examples(40)
    found = judge(examples, worths, platt=Platt(0.7, -0.4)).figures["log_loss"].mean
    shown = np.concatenate([worth[: one.num_shown] for one, worth in zip(examples, worths, strict=True)])
    clicked = np.concatenate([one.clicked_N[: one.num_shown] for one in examples])
    assert found == pytest.approx(log_loss(clicked, 1 / (1 + np.exp(-(0.7 * shown - 0.4)))))


def test_clicks_that_are_yet_to_come_are_no_error_of_the_chances() -> None:
    examples, worths = make_examples(40)
    rng = np.random.default_rng(0)
    young = [replace(one, arrived=float(share)) for one, share in zip(examples, rng.uniform(0.3, 1, 40), strict=True)]
    found = judge(young, worths, platt=Platt(0.7, -0.4)).figures["log_loss"].mean
    chances = [
        one.arrived / (1 + np.exp(-(0.7 * worth[: one.num_shown] - 0.4)))
        for one, worth in zip(young, worths, strict=True)
    ]
    clicked = np.concatenate([one.clicked_N[: one.num_shown] for one in examples])
    assert found == pytest.approx(log_loss(clicked, np.concatenate(chances)))


def test_platt_scaling_is_of_clicks_that_come_sooner_or_later() -> None:
    rng = np.random.default_rng(0)
    scores, arrived = rng.normal(size=40_000), rng.choice([0.4, 0.9], 40_000)
    clicked = rng.random(40_000) < arrived / (1 + np.exp(-(1.3 * scores - 2.0)))
    found = fit_platt(scores, clicked, arrived)
    assert (found.slope, found.intercept) == (pytest.approx(1.3, abs=0.1), pytest.approx(-2.0, abs=0.1))
    naive = fit_platt(scores, clicked)
    assert naive.intercept < -2.3
    flat = fit_platt(np.zeros(40_000), clicked, arrived).intercept
    assert flat > fit_platt(np.zeros(40_000), clicked).intercept + 0.3


def test_only_shown_items_have_labels_so_scores_of_the_others_change_no_label_figure() -> None:
    examples, worths = make_examples(50)
    other = [worth.copy() for worth in worths]
    for example, worth in zip(examples, other, strict=True):
        worth[example.num_shown :] = 99.0
    before, after = judge(examples, worths), judge(examples, other)
    for name in ("ndcg_10", "mrr", "hit_3", "auc", "log_loss", "precision_3", "calibration_error"):
        assert before.figures[name] == after.figures[name]
    assert before.figures["coverage"] != after.figures["coverage"]


def test_intervals_hold_the_figure_and_narrow_with_more_examples() -> None:
    examples, worths = make_examples(400, seed=3)
    noisy = [worth + np.random.default_rng(7).normal(size=len(worth)) for worth in worths]
    few, many = judge(examples[:50], noisy[:50]), judge(examples, noisy)
    for name in ("ndcg_10", "mrr", "hit_3", "auc", "log_loss", "precision_3", "recall_3", "f1_3", "novelty"):
        assert many.figures[name].low <= many.figures[name].mean <= many.figures[name].high, name
    for name in ("ndcg_10", "auc", "log_loss"):
        assert few.figures[name].high - few.figures[name].low > many.figures[name].high - many.figures[name].low


def test_ndcg_intervals_cover_the_true_mean_about_as_often_as_they_say() -> None:
    examples, worths = make_examples(3000, seed=4)
    rng = np.random.default_rng(1)
    noisy = [worth + rng.normal(size=len(worth)) for worth in worths]
    truth = judge(examples, noisy, bootstrap=2).figures["ndcg_10"].mean
    covered = 0
    for start in range(0, 3000, 60):
        interval = judge(examples[start : start + 60], noisy[start : start + 60]).figures["ndcg_10"]
        covered += interval.low <= truth <= interval.high
    assert 0.86 <= covered / 50 <= 1.0


def test_the_same_seed_gives_the_same_figures_and_plain_data_for_json() -> None:
    examples, worths = make_examples(30)
    first, second = judge(examples, worths, seed=5), judge(examples, worths, seed=5)
    assert first.figures == second.figures and first.slices == second.slices
    plain = msgspec.json.decode(msgspec.json.encode(first.plain()))
    assert plain["figures"]["auc"]["mean"] == pytest.approx(first.figures["auc"].mean)
    assert "judged_E" not in plain


def test_slices_are_by_history_device_and_new_items_and_count_their_examples() -> None:
    examples = [
        make_example([1, 0], number=0, user_known=0, mobile=1),
        make_example([1, 0], number=1, user_known=1, user_events=math.log1p(9), mobile=1),
        make_example([0, 1], number=2, user_known=1, user_events=math.log1p(10)),
        make_example([0, 1], number=3, user_known=1, user_events=math.log1p(100)),
    ]
    found = judge(examples, [np.array([1.0, 0.0])] * 4, popularity=Popularity({ItemId("i0"): 3}, {}))
    assert {name: one.examples for name, one in found.slices.items()} == {
        "new users": 1,
        "history under 10 events": 1,
        "history of 10 to 99 events": 1,
        "history of 100 events or more": 1,
        "a new item was clicked": 2,
        "mobile": 2,
        "other or unknown device": 2,
    }
    assert found.slices["mobile"].figures["mrr"].mean == 1.0
    assert found.slices["a new item was clicked"].figures["mrr"].mean == 0.5


def test_coverage_novelty_and_diversity_look_at_who_would_stand_first() -> None:
    examples = [make_example([0, 0], unshown=2, items=["a", "b", "c", "d"], number=number) for number in range(3)]
    scores = [np.array([0.0, 1.0, 2.0, 3.0])] * 3
    popularity = Popularity({ItemId(item): 8 for item in "abcd"}, {ItemId("a"): 3})
    vectors = np.array([[1.0, 0], [1, 0], [0, 1], [0, 1]], np.float32)
    texts = {text: row for row, text in enumerate(examples[0].texts)}
    table = ItemTable(texts, np.zeros((4, 1, 2), np.float16), np.ones((4, 1), np.bool_), vectors)
    found = judge(examples, scores, popularity=popularity, items=table).figures
    assert found["coverage"].mean == 0.75
    assert found["novelty"].mean == pytest.approx(-math.log2(1 / 8))  # b, c, d: never clicked, of 3 + 4 + 1
    likeness = cosine_similarity(vectors[1:])[np.triu_indices(3, 1)].mean()
    assert found["diversity"].mean == pytest.approx(1 - likeness)


def test_popular_are_the_most_clicked_candidates_at_hand() -> None:
    example = make_example([0, 0], unshown=3, items=["a", "b", "c", "d", "e"])
    clicks = {ItemId("a"): 9, ItemId("b"): 7, ItemId("c"): 5, ItemId("d"): 1}
    popularity = Popularity(dict.fromkeys(clicks, 20), clicks)
    for first, share in (("abc", 1.0), ("cba", 1.0), ("abd", 2 / 3), ("dea", 1 / 3)):
        scores = np.array([3.0 - first.index(item) if item in first else 0.0 for item in "abcde"])
        assert judge([example], [scores], popularity=popularity).sanity.popular_share == pytest.approx(share)
    assert judge([example], [np.arange(5.0)]).sanity.popular_share == 0  # nothing was ever clicked


def test_popularity_counts_what_was_shown_and_new_is_what_never_was() -> None:
    examples = [
        make_example([1] + [0] * 9, items=[f"i{index}" for index in range(10 * half, 10 * half + 10)], number=half)
        for half in (0, 1)
    ]
    popularity = count_popularity([*examples, examples[1]])
    assert popularity.shown["i10"] == popularity.clicks["i10"] == 2 and popularity.clicks["i11"] == 0
    assert popularity.is_new(ItemId("i20")) and not popularity.is_new(ItemId("i19"))
    assert popularity.self_information(ItemId("i10")) < popularity.self_information(ItemId("i0"))


def test_platt_scaling_makes_utilities_into_chances() -> None:
    rng = np.random.default_rng(0)
    scores = rng.normal(3.0, 2.0, size=20_000)
    clicked = rng.random(20_000) < 1 / (1 + np.exp(-(0.5 * scores - 3.0)))
    fitted = fit_platt(scores, clicked)
    assert fitted.slope == pytest.approx(0.5, abs=0.05) and fitted.intercept == pytest.approx(-3.0, abs=0.15)
    examples = [make_example(part.tolist()) for part in clicked.reshape(-1, 10)]
    raw = judge(examples, scores.reshape(-1, 10)).figures
    scaled = judge(examples, scores.reshape(-1, 10), platt=fitted).figures
    assert scaled["log_loss"].mean < raw["log_loss"].mean
    assert scaled["calibration_error"].mean < 0.02 < raw["calibration_error"].mean


@pytest.mark.parametrize("scores", [np.zeros(100), np.full(100, NAN), np.arange(100.0)])
def test_platt_scaling_of_too_little_is_flat_at_the_click_rate(scores: NDArray[np.float64]) -> None:
    clicked = np.arange(100) < (3 if scores[-1] == 99 else 20)
    fitted = fit_platt(scores, clicked)
    assert fitted.slope == 0
    known = np.isfinite(scores)
    assert fitted.intercept == pytest.approx(math.log((clicked[known].sum() + 1) / ((~clicked[known]).sum() + 1)))


def test_the_reliability_diagram_is_that_of_scikit_learn() -> None:
    examples, worths = make_examples(100, unshown=0, seed=9)
    found = judge(examples, worths).reliability
    chances = 1 / (1 + np.exp(-np.concatenate(worths)))
    clicked, predicted = calibration_curve(
        np.concatenate([one.clicked_N for one in examples]), chances, n_bins=10, strategy="quantile"
    )
    assert [one.predicted for one in found] == pytest.approx(predicted)
    assert [one.clicked for one in found] == pytest.approx(clicked)
    assert sum(one.items for one in found) == len(chances)


def test_examination_is_learned_from_explored_places_and_takes_the_position_bias_out() -> None:
    # All items are worth the same, and lower places are looked at less: no order is better than another, though the
    # logged one seems so.
    rng = np.random.default_rng(3)
    seen = 1 / np.arange(1, 11)
    examples = []
    for number in range(3000):
        explored = rng.random(10) < 0.3
        joy = np.full(10, 0.5)
        clicked = rng.random(10) < joy * seen
        examples.append(
            make_example(clicked.tolist(), propensities=np.where(explored, 0.01, 0.7).tolist(), number=number)
        )
    learned = fit_examination(examples, 10)
    np.testing.assert_allclose(learned, seen, atol=0.03)
    forward, backward = ([sign * np.arange(10.0)] * 3000 for sign in (-1, 1))
    biased = [judge(examples, order, bootstrap=2).figures["ndcg_10"].mean for order in (forward, backward)]
    gains = judged_gains(examples, forward, backward, Referee(1.0, 0.0, 0.0), seen)
    fair = [
        judge(examples, order, bootstrap=2, gains=gains).figures["ndcg_10_judged"].mean for order in (forward, backward)
    ]
    assert biased[0] - biased[1] > 0.25
    assert abs(fair[0] - fair[1]) < 0.1 * (biased[0] - biased[1])


def test_without_explored_clicks_no_place_is_less_seen_than_another() -> None:
    assert fit_examination([make_example([1, 0, 0])], 5).tolist() == [1.0] * 5


def test_no_examples_or_scores_for_others_are_an_error() -> None:
    with pytest.raises(ValueError, match="0 score arrays for 0 examples"):
        judge([], [])
    with pytest.raises(ValueError, match="0 score arrays for 1 examples"):
        judge([make_example([1, 0])], [])


def test_a_thousand_examples_and_resamples_take_about_a_second() -> None:
    examples, worths = make_examples(1000, shown=10, unshown=5, catalogue=500)
    popularity = count_popularity(examples)
    started = time.perf_counter()
    judge(examples, worths, popularity=popularity, platt=AS_SCORED, bootstrap=1000)
    assert time.perf_counter() - started < 5.0  # about 0.6 s alone on one core; a shared machine gets room


def bundle_examples(count: int) -> list[Example]:
    """Examples on the features of the bundle that tests share."""
    rng = np.random.default_rng(1)
    return [
        replace(one, features_NF=rng.normal(size=(len(one.texts), len(BUNDLE_FEATURES))).astype(np.float32))
        for one in make_examples(count, shown=5, unshown=3, catalogue=20)[0]
    ]


def test_rescored_examples_get_the_utility_that_serving_ranks_by(bundle_dir: Path) -> None:
    scorer = Scorer.load(bundle_dir, precision="fp32")
    examples = bundle_examples(6)
    table = encode_texts(scorer, examples)
    assert len(table.row_of) == len({text for one in examples for text in one.texts})
    steps: list[tuple[str, int, int]] = []
    found = score_examples(scorer, examples, rating_weight=0.25, items=table, progress=lambda *step: steps.append(step))
    assert steps[-1] == ("score", 6, 6)
    for example, scores_N in zip(examples, found, strict=True):
        items = scorer.encode_items(example.texts)
        clicks, ratings = scorer.score(
            scorer.encode_users([example.user_text]),
            items.states_NTH[None],
            items.mask_NT[None],
            example.features_NF[None],
            scorer.taste_model.worth_of(example.tastes)[None],
        )
        np.testing.assert_allclose(scores_N, clicks[0] + 0.25 * (ratings[0] - 3), atol=1e-4)
        assert scores_N.dtype == np.float32


def test_rescoring_tells_the_model_what_each_candidates_tags_are_worth_to_each_user() -> None:
    class Noting:
        told: ClassVar[list[Floats]] = []
        encoders = ("users", "items")
        taste_model = TasteModel(
            np.sort(np.array([bucket(f"t{number}") for number in range(4)], np.int16)),
            np.arange(4, dtype=np.float32),
            np.eye(4, dtype=np.float32),
            np.full(4, 0.1, np.float32),
            np.full(4, 0.1, np.float32),
            np.eye(4, dtype=np.float32),
            gain=1.0,
        )

        def encode_users(self, texts: Sequence[str]) -> None: ...

        def encode_items(self, texts: Sequence[str]) -> EncodedItems:
            count = len(texts)
            return EncodedItems(
                np.zeros((count, 1, 2), np.float16), np.ones((count, 1), np.bool_), np.zeros((count, 2))
            )

        def score(self, users, states, mask, features, tag_worth):  # type: ignore[no-untyped-def]
            self.told.append(tag_worth[0])
            return np.zeros(mask.shape[:2], np.float32), np.full(mask.shape[:2], 3.0, np.float32)

    examples = [
        replace(one, tastes=make_tastes({f"t{number}": (1.0, 2.0)}, [[f"t{row}"] for row in range(len(one.texts))]))
        for number, one in enumerate(make_examples(4)[0])
    ]
    score_examples(Noting(), examples, rating_weight=0.25)
    for example, told in zip(examples, Noting.told, strict=True):
        np.testing.assert_array_equal(told, Noting.taste_model.worth_of(example.tastes))
        assert len(set(told.tolist())) > 1


def test_examples_rescored_several_at_a_time_score_as_they_do_one_by_one(bundle_dir: Path) -> None:
    scorer, examples = Scorer.load(bundle_dir, precision="int8"), bundle_examples(12)
    alone, together = (score_examples(scorer, examples, rating_weight=0.25, threads=threads) for threads in (1, 3))
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("shared", [True, False])
def test_models_scored_beside_each_other_score_as_alone_and_share_what_encodes_users(
    bundle_dir: Path, monkeypatch: pytest.MonkeyPatch, shared: bool
) -> None:
    parts, examples = Parts(), bundle_examples(6)
    one, other = (Scorer.load(bundle_dir, parts if shared else None, precision="int8") for _ in range(2))
    assert (one.encoders == other.encoders) == shared
    table = encode_texts(one, examples)
    alone = score_examples(one, examples, rating_weight=0.25, items=table)
    texts: list[str] = []
    encode_users = Scorer.encode_users
    monkeypatch.setattr(Scorer, "encode_users", lambda self, told: texts.extend(told) or encode_users(self, told))
    beside = score_beside([(one, table), (other, table)], examples, rating_weight=0.25)
    assert len(texts) == len(examples) * (1 if shared else 2)
    for found in beside:
        for scores_N, usual_N in zip(found, alone, strict=True):
            np.testing.assert_array_equal(scores_N, usual_N)


def test_latency_is_the_median_ratio_of_the_two_on_the_same_examples(bundle_dir: Path) -> None:
    scorer = Scorer.load(bundle_dir, precision="fp32")
    examples = bundle_examples(5)
    table = encode_texts(scorer, examples)

    class Clock:
        """Each call of the slower scorer takes three seconds, of the other two."""

        now = 0.0

        def __call__(self) -> float:
            return self.now

    clock = Clock()

    class Timed:
        encoders, taste_model = scorer.encoders, scorer.taste_model

        def __init__(self, seconds: float) -> None:
            self.seconds = seconds

        def encode_users(self, texts: Sequence[str]) -> object:
            return scorer.encode_users(texts)

        def encode_items(self, texts: Sequence[str]) -> object:
            return scorer.encode_items(texts)

        def score(self, users, states, mask, features, tag_worth):  # type: ignore[no-untyped-def]
            assert features.shape[1] == 20
            clock.now += self.seconds
            return scorer.score(users, states, mask, features, tag_worth)

    ratio = latency_ratio((Timed(2.0), table), (Timed(3.0), table), examples, num_candidates=20, clock=clock)
    assert ratio == 1.5
    with pytest.raises(ValueError, match="no examples"):
        latency_ratio((Timed(2.0), table), (Timed(3.0), table), [])
