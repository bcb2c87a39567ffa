"""Tastes and tags, by bucket."""

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tailrace.errors import InvalidRecord
from tailrace.events import decode_event
from tailrace.ids import ItemId
from tailrace.items import Item
from tailrace.tastes import BUCKETS, MOST_TAGS, NO_TAG, bucket, make_tastes, no_tastes, strongest, tags_of

tags = st.text(max_size=20)


def test_buckets_are_the_same_for_ever() -> None:
    assert [bucket(tag) for tag in ("gothic", "war", "")] == [28, 256, 228]


@given(st.dictionaries(tags, st.floats(-5, 5)), st.lists(st.lists(tags, max_size=12), max_size=6))
def test_every_taste_and_tag_stands_in_its_bucket(tastes: dict[str, float], tags_N: list[list[str]]) -> None:
    made = make_tastes(tastes, tags_N)
    assert made.user_V.shape == (BUCKETS,) and made.tags_NK.shape == (len(tags_N), MOST_TAGS)
    assert made.user_V.sum() == pytest.approx(sum(tastes.values()), abs=1e-3)
    for row, own in zip(made.tags_NK, tags_N, strict=True):
        kept = list(dict.fromkeys(own))[:MOST_TAGS]
        assert row.tolist() == [bucket(tag) for tag in kept] + [NO_TAG] * (MOST_TAGS - len(kept))


def test_candidates_are_chosen_in_order_and_the_user_stays() -> None:
    made = make_tastes({"war": 1.0}, [["a"], ["b"], ["c"]])
    few = made.among(np.array([2, 0]))
    assert few.tags_NK[:, 0].tolist() == [bucket("c"), bucket("a")]
    assert few.user_V is made.user_V


def test_tags_of_an_item_are_its_first_few_each_once() -> None:
    item = Item(item_id=ItemId("i"), title="I", tags=["war", "war", *(f"t{number}" for number in range(9))])
    assert tags_of(item) == ["war", *(f"t{number}" for number in range(7))]


def test_nobody_known_likes_nothing() -> None:
    nothing = no_tastes(3)
    assert not nothing.user_V.any() and (nothing.tags_NK == NO_TAG).all()


def test_tastes_beyond_the_limit_are_cut_where_they_are_made_and_refused_where_they_are_read() -> None:
    assert strongest({"war": 241.0, "sea": -99.0}) == {"war": 8.0, "sea": -8.0}
    record = {
        "event_id": "r", "request_id": "r", "user_id": "u", "occurred_at": 0, "model_version": "v",
        "feature_names_hash": "h", "user_text": "", "shown": [],
    }  # fmt: skip
    assert decode_event("impressions", msgspec.json.encode(record | {"tastes": {"war": 8.0}}))
    for tastes in ({"war": 8.1}, {"war": 1e308}, {f"t{number}": 0.1 for number in range(65)}, {"w" * 257: 0.1}):
        with pytest.raises(InvalidRecord, match="tastes"):
            decode_event("impressions", msgspec.json.encode(record | {"tastes": tastes}))


def test_only_the_strongest_tastes_are_kept_of_equals_the_first_by_name() -> None:
    kept = strongest({f"t{number:03}": float(number % 2 or -1) for number in range(200)} | {"loved": 7.5})
    assert len(kept) == 64 and kept["loved"] == 7.5
    assert list(kept)[1:4] == ["t000", "t001", "t002"]
