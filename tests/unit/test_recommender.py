"""`recommend`: what an answer is made of, on every rung that a ranker has."""

import msgspec
import numpy as np
import pytest

from services.bodies import Asked, RankedAnswer, RecommendationRequest, RequestContext
from services.popular import rank_popular
from services.recommender import recommend
from services.situation import merge_context
from tailrace.catalogue import Catalogue
from tailrace.counters import CounterTable
from tailrace.errors import Overloaded, ScoringError, TailraceError, TooLate
from tailrace.events import Click, Context, Impression, encode
from tailrace.features import FEATURE_NAMES, FEATURE_NAMES_HASH, decode_features
from tailrace.fold import fold_event
from tailrace.ids import ItemId, RequestId
from tailrace.items import Item
from tailrace.profile import Profile, apply_seen, decode_profile, encode_profile
from tailrace.settings import RankerSettings, SlateSettings
from tailrace.tastes import TasteModel, bucket, make_tastes, tags_of
from tailrace.text import render_item
from tests.fakes import WordModel, WordVectors

NOW_MS = 1_790_000_000_000
SUBJECTS = ("ghosts", "ships", "gardens", "machines", "letters")
RANKER = RankerSettings(num_candidates=30)
SLATE = SlateSettings(exploration=0.0)


def make_catalogue(count: int = 60) -> Catalogue:
    catalogue = Catalogue()
    for number in range(count):
        subject = SUBJECTS[number % len(SUBJECTS)]
        item = Item(
            item_id=f"i{number}", title=f"All about {subject} {number}", tags=[subject], created_at=NOW_MS - number
        )
        catalogue.apply_item(item.item_id, encode(item), NOW_MS)
    return catalogue


def profile_with_clicks(catalogue: Catalogue, *item_ids: str) -> bytes:
    profile = Profile("u")
    for number, item_id in enumerate(item_ids):
        click = Click(event_id=f"e{number}", user_id="u", item_id=item_id, occurred_at=NOW_MS - 1000 + number)
        fold_event(click, profile, CounterTable(), catalogue.item(item_id))
    return encode_profile(profile)


def ask(profile: bytes | None = None, request_id: str = "r1", **fields: object) -> Asked:
    request = msgspec.convert({"user_id": "u", **fields}, RecommendationRequest)
    return Asked(request_id=RequestId(request_id), request=request, profile=profile, now_ms=NOW_MS, budget_s=5.0)


def impression_of(answer: RankedAnswer) -> Impression:
    return msgspec.json.decode(answer.impression, type=Impression)


def test_new_user_gets_a_full_slate() -> None:
    catalogue = make_catalogue()
    answer = recommend(ask(n=7), catalogue, WordModel(catalogue), RANKER, SLATE)
    assert answer.degraded == "none" and answer.model_version == "words"
    assert [item.position for item in answer.items] == list(range(7))
    assert len({item.item_id for item in answer.items}) == 7


def test_same_request_gives_the_same_answer() -> None:
    catalogue = make_catalogue()
    model, explore = WordModel(catalogue), SlateSettings(exploration=0.5)
    first, again, other = (
        recommend(ask(request_id=name), catalogue, model, RANKER, explore) for name in ("r1", "r1", "r2")
    )
    assert first.items == again.items and first.impression == again.impression
    assert [item.item_id for item in first.items] != [item.item_id for item in other.items]


def test_clicked_subject_comes_first_and_clicked_item_not_again() -> None:
    catalogue = make_catalogue()
    profile = profile_with_clicks(catalogue, "i0", "i5")
    slate = SlateSettings(exploration=0.0, diversity=0.0, max_per_tag=0)
    answer = recommend(ask(profile, n=3, explain=True), catalogue, WordModel(catalogue), RANKER, slate)
    assert all("ghosts" in item.title for item in answer.items)
    assert {"i0", "i5"}.isdisjoint(item.item_id for item in answer.items)
    assert all(item.reasons for item in answer.items)


def test_seen_items_come_back_only_if_asked() -> None:
    catalogue = make_catalogue(5)
    profile = profile_with_clicks(catalogue, "i0")
    model = WordModel(catalogue)
    without = recommend(ask(profile), catalogue, model, RANKER, SLATE)
    with_seen = recommend(ask(profile, include_seen=True), catalogue, model, RANKER, SLATE)
    assert {item.item_id for item in with_seen.items} - {item.item_id for item in without.items} == {"i0"}


def test_exclusions_filters_and_callers_candidates_hold() -> None:
    catalogue = make_catalogue()
    model = WordModel(catalogue)
    filtered = recommend(ask(filters={"tags_any": ["ships"]}, exclude=["i1"]), catalogue, model, RANKER, SLATE)
    assert filtered.items and all("ships" in item.title and item.item_id != "i1" for item in filtered.items)
    asked = recommend(ask(candidates=["i3", "nowhere", "i4"]), catalogue, model, RANKER, SLATE)
    assert {item.item_id for item in asked.items} == {"i3", "i4"}
    assert {item.source for item in asked.items} == {"caller"}


def test_query_draws_in_what_it_names() -> None:
    catalogue = make_catalogue()
    answer = recommend(ask(query="machines", n=1, explain=True), catalogue, WordModel(catalogue), RANKER, SLATE)
    assert "machines" in answer.items[0].title


def test_impression_holds_exactly_what_was_ranked_on() -> None:
    catalogue = make_catalogue()
    model = WordModel(catalogue)
    answer = recommend(ask(n=4, context={"device": "phone"}, query="ships"), catalogue, model, RANKER, SLATE)
    impression = impression_of(answer)
    assert impression.event_id == impression.request_id == "r1" and impression.user_id == "u"
    assert impression.feature_names_hash == FEATURE_NAMES_HASH and impression.model_version == "words"
    assert impression.user_text == model.user_texts[0]
    assert [shown.item_id for shown in impression.shown] == [item.item_id for item in answer.items]
    assert len(impression.unshown) == SLATE.unshown_logged and impression.num_candidates == RANKER.num_candidates
    assert impression.context == {"device": "phone"} and impression.query == "ships"
    for ranked in [*impression.shown, *impression.unshown]:
        row = catalogue.row(ranked.item_id)
        assert row is not None and ranked.text == model.encodings.texts[row]
        assert decode_features(ranked.features).shape == (len(FEATURE_NAMES),)
    assert all(0 < (shown.propensity or 0) <= 1 for shown in impression.shown)
    assert {shown.item_id for shown in impression.shown}.isdisjoint(lost.item_id for lost in impression.unshown)


def test_answers_and_tags_are_logged_as_the_model_got_them() -> None:
    catalogue = make_catalogue()
    profile = decode_profile(profile_with_clicks(catalogue, "i0", "i5"))
    for number in range(8):
        apply_seen(profile.impressions, ItemId(f"i{number}"), NOW_MS)
    model = WordModel(catalogue)
    model.taste_model = knows("ghosts", "ships")
    everything = msgspec.structs.replace(SLATE, unshown_logged=1000)
    impression = impression_of(recommend(ask(encode_profile(profile), n=4), catalogue, model, RANKER, everything))
    logged = [*impression.shown, *impression.unshown]
    assert len(logged) == impression.num_candidates and any(one.tags for one in logged)
    for one in logged:
        item = catalogue.item(one.item_id)
        assert item is not None and one.tags == tags_of(item)
    made = make_tastes(impression.answers, [one.tags for one in logged])
    assert impression.answers and all(map(np.array_equal, made.answers, model.answers[0]))
    # The model's candidates stand in an order of their own: what it was told of each is known by its text.
    told = dict(zip(model.scored_texts[0], model.tag_worths[0].tolist(), strict=True))
    assert [told[one.text] for one in logged] == model.taste_model.worth_of(made).tolist()
    assert len(set(told.values())) > 1


def knows(one: str, other: str) -> TasteModel:
    """What is known where whoever likes the one likes the other twenty times as much."""
    known = np.array(sorted([(bucket(one), 1.0), (bucket(other), 20.0)]))
    strength_T = known[:, 1].astype(np.float32)
    covariance_TT = np.outer(strength_T, strength_T)
    none_T, little_T = np.zeros(2, np.float32), np.full(2, 0.001, np.float32)
    buckets = known[:, 0].astype(np.int16)
    return TasteModel(buckets, none_T, covariance_TT, none_T, little_T, np.eye(2, dtype=np.float32), gain=1.0)


def test_candidates_are_drawn_by_what_the_model_has_learned_of_the_users_tastes() -> None:
    catalogue = make_catalogue(200)
    profile = decode_profile(profile_with_clicks(catalogue, "i0", "i5"))  # of ghosts
    for number in range(8):
        apply_seen(profile.impressions, ItemId(f"i{number}"), NOW_MS)
    model = WordModel(catalogue)
    few = RankerSettings(num_candidates=20)

    def ships_drawn() -> int:
        everything = msgspec.structs.replace(SLATE, unshown_logged=1000)
        impression = impression_of(recommend(ask(encode_profile(profile)), catalogue, model, few, everything))
        logged = [*impression.shown, *impression.unshown]
        return sum(one.source == "interests" and one.tags == ["ships"] for one in logged)

    assert ships_drawn() == 0
    model.taste_model = knows("ghosts", "ships")
    assert ships_drawn() > 3


def test_item_that_changes_while_it_is_ranked_is_logged_as_it_was_ranked() -> None:
    catalogue = make_catalogue()

    class Meanwhile(WordModel):
        def score(self, user, items, features_NF, tag_worth_N, deadline):  # type: ignore[no-untyped-def]
            for item_id in ("i3", "i4"):
                changed = Item(item_id=item_id, title="Something else entirely")
                catalogue.apply_item(item_id, encode(changed), NOW_MS)
            while self.encodings.catch_up(WordVectors(), catalogue):
                pass
            return super().score(user, items, features_NF, tag_worth_N, deadline)

    texts = {i: catalogue.item(i) for i in ("i3", "i4")}
    model = Meanwhile(catalogue)
    shown = impression_of(recommend(ask(candidates=["i3", "i4"]), catalogue, model, RANKER, SLATE)).shown
    user_vector = WordVectors().vector(model.user_texts[0])
    for ranked in shown:
        was = texts[ranked.item_id]
        assert was is not None and ranked.text == render_item(was)
        assert ranked.score == pytest.approx(float(WordVectors().vector(ranked.text) @ user_vector), abs=1e-5)


def test_dry_run_makes_no_impression() -> None:
    catalogue = make_catalogue()
    assert recommend(ask(dry_run=True), catalogue, WordModel(catalogue), RANKER, SLATE).impression == b""


@pytest.mark.parametrize("failure", [TooLate("late"), Overloaded("full"), ScoringError("broken")])
@pytest.mark.parametrize("half", ["encode_failure", "score_failure"])
def test_text_model_that_fails_leaves_the_prior(half: str, failure: TailraceError) -> None:
    catalogue = make_catalogue()
    model = WordModel(catalogue)
    setattr(model, half, failure)
    profile = profile_with_clicks(catalogue, "i0", "i5")
    answer = recommend(ask(profile, n=5), catalogue, model, RANKER, SLATE)
    assert answer.degraded == "no_text" and len(answer.items) == 5
    assert impression_of(answer).degraded == "no_text"
    assert "ghosts" in answer.items[0].title


def test_unreadable_profile_is_named_in_answer_and_impression_alike() -> None:
    catalogue = make_catalogue()
    asked = msgspec.structs.replace(ask(), profile_missing=True)
    answer = recommend(asked, catalogue, WordModel(catalogue), RANKER, SLATE)
    assert answer.degraded == impression_of(answer).degraded == "no_profile"


def test_seen_item_asked_for_again_is_not_explained_by_itself() -> None:
    catalogue = make_catalogue()
    profile = profile_with_clicks(catalogue, "i0")
    asked = ask(profile, candidates=["i0"], include_seen=True, explain=True)
    (item,) = recommend(asked, catalogue, WordModel(catalogue), RANKER, SLATE).items
    assert item.item_id == "i0" and not any("because" in reason for reason in item.reasons or [])


def test_popular_rung_ranks_all_that_may_be_shown_with_certainty() -> None:
    catalogue = make_catalogue()
    items, impression = rank_popular(ask(n=3, explain=True), catalogue)
    again, _ = rank_popular(ask(n=3, explain=True, request_id="r2"), catalogue)
    assert [item.item_id for item in items] == ["i0", "i1", "i2"] and items == again
    assert items[0].reasons == ["among the newest"]
    logged = msgspec.json.decode(impression, type=Impression)
    assert logged.num_candidates == 60 and {shown.propensity for shown in logged.shown} == {1.0}
    assert rank_popular(ask(), Catalogue())[0] == []


def test_empty_catalogue_gives_an_empty_slate() -> None:
    catalogue = Catalogue()
    answer = recommend(ask(query="ships"), catalogue, WordModel(catalogue), RANKER, SLATE)
    assert answer.items == [] and answer.degraded == "none"


def test_item_that_is_not_encoded_yet_is_left_out() -> None:
    catalogue = make_catalogue(5)
    model = WordModel(catalogue)
    late = Item(item_id="late", title="All about ships, late")
    catalogue.apply_item("late", encode(late), NOW_MS)
    answer = recommend(ask(), catalogue, model, RANKER, SLATE)
    assert "late" not in {item.item_id for item in answer.items}


def test_removed_item_is_gone_though_its_encoding_is_still_there() -> None:
    catalogue = make_catalogue(5)
    model = WordModel(catalogue)
    catalogue.apply_item("i2", None, NOW_MS)
    answer = recommend(ask(), catalogue, model, RANKER, SLATE)
    assert {item.item_id for item in answer.items} == {"i0", "i1", "i3", "i4"}


def test_users_text_is_encoded_once_however_many_candidates() -> None:
    catalogue = make_catalogue()
    model = WordModel(catalogue)
    recommend(ask(n=50), catalogue, model, RankerSettings(num_candidates=60), SLATE)
    assert len(model.user_texts) == 1


def test_callers_context_overrides_what_is_known() -> None:
    profile = Profile("u")
    profile.context = Context(
        event_id="c", user_id="u", occurred_at=NOW_MS - 1000, device="tv", country="PT", attributes={"weather": "rain"}
    )
    merged = merge_context(RequestContext(device="phone"), profile, RequestId("r"), NOW_MS)
    assert merged is not None and (merged.device, merged.country) == ("phone", "PT")
    assert merged.attributes == {"weather": "rain"}
    assert merge_context(None, profile, RequestId("r"), NOW_MS) is profile.context
    assert merge_context(None, profile, RequestId("r"), NOW_MS + 10**9) is None


def test_scores_are_finite_numbers() -> None:
    catalogue = make_catalogue()
    answer = recommend(ask(n=10), catalogue, WordModel(catalogue), RANKER, SLATE)
    assert np.isfinite([item.score for item in answer.items]).all()
