"""Answers, tags by bucket, and what a model infers from them."""

from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tailrace.errors import InvalidRecord
from tailrace.events import decode_event
from tailrace.ids import ItemId
from tailrace.items import Item
from tailrace.tastes import (
    BUCKETS,
    MOST_TAGS,
    NO_TAG,
    TasteModel,
    bucket,
    bucket_answers,
    make_tastes,
    most_answered,
    no_tastes,
    sum_worth,
    tags_of,
)

tags = st.text(max_size=20)
amounts = st.floats(0, 100)


def test_buckets_are_the_same_for_ever() -> None:
    assert [bucket(tag) for tag in ("gothic", "war", "")] == [6684, 6400, 9956]


@given(st.dictionaries(tags, st.tuples(amounts, amounts)), st.lists(st.lists(tags, max_size=12), max_size=6))
def test_every_answer_and_tag_stands_in_its_bucket(
    answers: dict[str, tuple[float, float]], tags_N: list[list[str]]
) -> None:
    made = make_tastes(answers, tags_N)
    met_E, clicked_E, shown_E = made.answers
    assert met_E.tolist() == sorted({bucket(tag) for tag in answers})
    sums = (sum(clicked for clicked, _ in answers.values()), sum(shown for _, shown in answers.values()))
    assert (clicked_E.sum(), shown_E.sum()) == pytest.approx(sums, rel=1e-4)
    for row, own in zip(made.tags_NK, tags_N, strict=True):
        kept = list(dict.fromkeys(own))[:MOST_TAGS]
        assert row.tolist() == [bucket(tag) for tag in kept] + [NO_TAG] * (MOST_TAGS - len(kept))


def test_candidates_are_chosen_in_order_and_the_user_stays() -> None:
    made = make_tastes({"war": (1.0, 2.0)}, [["a"], ["b"], ["c"]])
    few = made.among(np.array([2, 0]))
    assert few.tags_NK[:, 0].tolist() == [bucket("c"), bucket("a")]
    assert few.answers is made.answers


def test_tags_of_an_item_are_its_first_few_each_once() -> None:
    item = Item(item_id=ItemId("i"), title="I", tags=["war", "war", *(f"t{number}" for number in range(9))])
    assert tags_of(item) == ["war", *(f"t{number}" for number in range(7))]


def test_nobody_known_has_answered_nothing() -> None:
    nothing = no_tastes(3)
    assert not len(nothing.answers.met_E) and (nothing.tags_NK == NO_TAG).all()


def test_answers_that_no_program_makes_are_refused_where_they_are_read() -> None:
    record = {
        "event_id": "r", "request_id": "r", "user_id": "u", "occurred_at": 0, "model_version": "v",
        "feature_names_hash": "h", "user_text": "", "shown": [],
    }  # fmt: skip
    assert decode_event("impressions", msgspec.json.encode(record | {"answers": {"war": [1.0, 8.0]}}))
    too_many = {f"t{number}": [0.1, 1.0] for number in range(65)}
    for answers in ({"war": [-0.1, 1.0]}, {"war": [0.0, 501.0]}, {"war": [1.0]}, too_many, {"w" * 257: [0.1, 1.0]}):
        with pytest.raises(InvalidRecord, match="answers"):
            decode_event("impressions", msgspec.json.encode(record | {"answers": answers}))


def test_only_the_tags_shown_most_are_kept_of_equals_the_first_by_name() -> None:
    kept = most_answered({f"t{number:03}": (0.0, 1.0) for number in range(200)} | {"often": (0.0, 7.5)})
    assert len(kept) == 64 and kept["often"] == (0.0, 7.5)
    assert list(kept)[1:4] == ["t000", "t001", "t002"]


def make_model(seed: int, count: int) -> TasteModel:
    """What is known of the tags t0, t1, …"""
    rng = np.random.default_rng(seed)
    known_T = np.sort(np.array([bucket(f"t{number}") for number in range(count)], np.int16))
    root_TT = rng.normal(size=(count, count))
    together_TT = np.corrcoef(rng.normal(size=(count, 3 * count)))
    parts = rng.normal(size=count), root_TT @ root_TT.T, *rng.uniform(0.02, 0.2, size=(2, count)), together_TT
    return TasteModel(known_T, *(part.astype(np.float32) for part in parts), gain=1.0)


@given(st.integers(0, 1000), st.dictionaries(st.integers(0, 6), st.tuples(amounts, st.floats(0.01, 100))))
def test_worth_is_the_posterior_mean_of_a_normal_prior(seed: int, met: dict[int, tuple[float, float]]) -> None:
    model = make_model(seed, 5)  # two of the seven tags are unknown to it
    worth_V = model.worth(bucket_answers({f"t{number}": answer for number, answer in met.items()}))
    # By the textbook: precisions add up, and each sight of a tag pulls by what it tells.
    root_T, pull_T = np.zeros(5), np.zeros(5)
    for number, (clicked, shown) in met.items():
        if number < 5:
            row = model.known_T.tolist().index(bucket(f"t{number}"))
            root_T[row] = (model.information_T[row] * np.float32(shown)) ** 0.5
            pull_T[row] = np.float32(clicked) - model.rate_T[row] * np.float32(shown)
    told_TT = root_T[:, None] * model.together_TT * root_T
    covariance_TT = model.covariance_TT.astype(float) + 1e-9 * np.eye(5)
    expected_T = np.linalg.solve(np.linalg.inv(covariance_TT) + told_TT, pull_T) + model.mean_T
    np.testing.assert_allclose(worth_V[model.known_T], expected_T, rtol=1e-2, atol=1e-2 * np.abs(expected_T).max())
    others = np.setdiff1d(np.arange(BUCKETS), model.known_T)
    assert not worth_V[others].any()


def knows(covariance_TT: np.ndarray, together_TT: np.ndarray) -> TasteModel:
    """What is known of castles and ghosts."""
    known_T = np.sort(np.array([bucket("castles"), bucket("ghosts")], np.int16))
    rate_T, covariance_TT = np.full(2, 0.05, np.float32), covariance_TT.astype(np.float32)
    return TasteModel(
        known_T, np.zeros(2, np.float32), covariance_TT, rate_T, rate_T, together_TT.astype(np.float32), gain=1.0
    )


def test_tags_always_shown_together_are_one_sight_and_not_two() -> None:
    answers = bucket_answers({"castles": (10.0, 40.0), "ghosts": (10.0, 40.0)})
    once, twice = (
        knows(np.eye(2), together_TT).worth(answers)[bucket("ghosts")] for together_TT in (np.ones((2, 2)), np.eye(2))
    )
    assert 0 < once < 0.8 * twice


def test_click_on_one_tag_tells_of_those_liked_with_it_and_the_more_the_oftener() -> None:
    model = knows(np.array([[1.0, 0.8], [0.8, 1.0]]), np.eye(2))

    def ghosts(clicked: float, shown: float) -> float:
        return float(model.worth(bucket_answers({"castles": (clicked, shown)}))[bucket("ghosts")])

    assert ghosts(0, 40) < ghosts(0, 4) < 0 == ghosts(0, 0) < ghosts(1, 4) < ghosts(10, 40)


def test_ignorant_model_finds_nothing_worth_anything() -> None:
    tastes = make_tastes({"war": (3.0, 3.0)}, [["war"], []])
    assert not TasteModel.ignorant().worth_of(tastes).any()


def test_tags_of_an_item_are_summed_by_the_root_of_their_number() -> None:
    worth_V = np.zeros(BUCKETS, np.float32)
    worth_V[[bucket("a"), bucket("b")]] = 1.0, 3.0
    found_N = sum_worth(worth_V, make_tastes({}, [["a"], ["a", "b"], ["a", "b", "c", "d"], []]).tags_NK)
    assert found_N.tolist() == pytest.approx([1.0, 4 / 2**0.5, 2.0, 0.0])


def test_who_clicks_as_usual_is_taken_for_usual_however_much_is_known_of_them() -> None:
    model = make_model(3, 4)
    usual_V = model.worth(bucket_answers({}))
    tags = {bucket(f"t{number}"): f"t{number}" for number in range(4)}
    for shown in (1.0, 400.0):
        rates = zip(model.known_T.tolist(), model.rate_T.tolist(), strict=True)
        answers = bucket_answers({tags[of]: (shown * rate, shown) for of, rate in rates})
        np.testing.assert_allclose(model.worth(answers), usual_V, atol=1e-3)


def test_answers_beyond_the_limit_are_cut_and_keep_their_share() -> None:
    assert most_answered({"war": (500.0, 2000.0)}) == {"war": (125.0, 500.0)}


def test_saved_model_comes_back(tmp_path: Path) -> None:
    for model in (make_model(1, 4), TasteModel.ignorant()):
        model.save(tmp_path / "tastes.safetensors")
        again = TasteModel.load(tmp_path / "tastes.safetensors")
        answers = bucket_answers({"t1": (1.0, 2.0), "t9": (1.0, 1.0)})
        np.testing.assert_array_equal(again.worth(answers), model.worth(answers))
