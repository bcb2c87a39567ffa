"""Tastes and tags, by bucket."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tailrace.tastes import BUCKETS, MOST_TAGS, NO_TAG, bucket, make_tastes, no_tastes, strongest

tags = st.text(max_size=20)


def test_buckets_are_the_same_for_ever() -> None:
    assert [bucket(tag) for tag in ("gothic", "war", "")] == [28, 256, 228]


@given(st.dictionaries(tags, st.floats(-5, 5)), st.lists(st.lists(tags, max_size=12), max_size=6))
def test_every_taste_and_tag_stands_in_its_bucket(tastes: dict[str, float], tags_N: list[list[str]]) -> None:
    made = make_tastes(tastes, tags_N)
    assert made.user_V.shape == (BUCKETS,) and made.tags_NK.shape == (len(tags_N), MOST_TAGS)
    assert made.user_V.sum() == pytest.approx(sum(tastes.values()), abs=1e-3)
    for row, own in zip(made.tags_NK, tags_N, strict=True):
        kept = own[:MOST_TAGS]
        assert row.tolist() == [bucket(tag) for tag in kept] + [NO_TAG] * (MOST_TAGS - len(kept))


def test_candidates_are_chosen_in_order_and_the_user_stays() -> None:
    made = make_tastes({"war": 1.0}, [["a"], ["b"], ["c"]])
    few = made.among(np.array([2, 0]))
    assert few.tags_NK[:, 0].tolist() == [bucket("c"), bucket("a")]
    assert few.user_V is made.user_V


def test_nobody_known_likes_nothing() -> None:
    nothing = no_tastes(3)
    assert not nothing.user_V.any() and (nothing.tags_NK == NO_TAG).all()


def test_only_the_strongest_tastes_are_kept_of_equals_the_first_by_name() -> None:
    kept = strongest({f"t{number:03}": float(number % 2 or -1) for number in range(200)} | {"loved": 9.0})
    assert len(kept) == 64 and kept["loved"] == 9.0
    assert list(kept)[1:4] == ["t000", "t001", "t002"]
