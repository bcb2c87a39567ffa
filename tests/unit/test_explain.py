"""Why an item is in a slate: every reason needs its evidence."""

import numpy as np

from services.explain import MAX_REASONS, Evidence, explain, gather_evidence
from tailrace.catalogue import Catalogue
from tailrace.cosines import make_cosines
from tailrace.counters import CounterTable, item_stats
from tailrace.events import Action, Click, encode
from tailrace.features import FEATURE_NAMES, compute_features
from tailrace.fold import fold_event
from tailrace.ids import EventId, ItemId, UserId
from tailrace.items import Fact, Item
from tailrace.profile import Profile
from tailrace.text import now_interests

NOW_MS = 1_700_000_000_000
BOOK = Item(
    item_id=ItemId("f"), title="Frankenstein", tags=["gothic", "science"], facts=[Fact("author", "Mary Shelley")]
)


def evidence(**told: object) -> Evidence:
    """Evidence of nothing but what is told: features by name, or fields."""
    features = np.zeros(len(FEATURE_NAMES), dtype=np.float32)
    features[FEATURE_NAMES.index("log_age")] = np.log1p(9000)
    fields = {}
    for name, value in told.items():
        if name in FEATURE_NAMES:
            features[FEATURE_NAMES.index(name)] = value
        else:
            fields[name] = value
    return Evidence(**({"item": BOOK, "features_F": features, "source": "user", "explored": False} | fields))


def reasons(one: Evidence, query: str | None = None, **interests: float) -> list[str]:
    return explain(one, query=query, interests={key.replace("__", ":"): weight for key, weight in interests.items()})


def test_each_reason_is_given_on_its_evidence() -> None:
    assert reasons(evidence(cos_query=0.6), "monsters") == ["matches 'monsters'"]
    assert reasons(evidence(near_title="Dracula", near_cosine=0.7)) == ["because you liked Dracula"]
    assert reasons(evidence(near_title="Dracula", near_cosine=0.7, near_word="fine")) == [
        "because you looked at Dracula"
    ]
    assert reasons(evidence(), tag__gothic=2.0, tag__science=1.0) == ["matches your interest in gothic"]
    assert reasons(evidence(covisit_title="Dracula", covisit=1.0)) == ["others who opened Dracula opened this too"]
    assert reasons(evidence(log_users_1h=np.log1p(5), rank_log_users_1h=1.0)) == ["popular in the last hour"]
    assert reasons(evidence(log_users_24h=np.log1p(99), rank_log_users_24h=1.0, log_since_touch_2=np.log1p(1439))) == [
        "popular in the last day"
    ]
    assert reasons(evidence(log_users_24h=np.log1p(5), rank_log_users_24h=1.0)) == ["popular in the last day"]
    assert reasons(evidence(log_age=np.log1p(2), rank_newness=0.95)) == ["new"]
    assert reasons(evidence(explored=True))[0].startswith("something different")


def test_without_evidence_no_such_reason_is_given() -> None:
    plain = ["one of the best matches we have"]
    assert reasons(evidence(cos_query=0.1), "monsters") == plain
    assert reasons(evidence(cos_query=0.9)) == plain
    assert reasons(evidence(near_title="Dracula", near_cosine=0.2)) == plain
    assert reasons(evidence(near_title="Dracula", near_cosine=0.9, near_word="disliked")) == plain
    assert reasons(evidence(), tag__war=3.0, tag__gothic=-1.0) == plain
    assert reasons(evidence(log_users_1h=np.log1p(1), rank_log_users_1h=1.0)) == plain
    faint = {"log_users_1h": np.log1p(3), "rank_log_users_1h": 1.0}  # of 96 users, five hours ago
    assert reasons(evidence(**faint, log_since_touch_2=np.log1p(300))) == plain
    assert reasons(evidence(log_age=np.log1p(2), rank_newness=0.5)) == plain


def test_an_item_without_evidence_is_explained_by_its_source() -> None:
    assert reasons(evidence(source="cold")) == ["not yet discovered by many"]


def test_the_weightiest_reason_comes_first_and_there_are_not_many() -> None:
    told = reasons(
        evidence(
            cos_query=0.7,
            near_title="Dracula",
            near_cosine=0.8,
            covisit_title="Emma",
            covisit=1.0,
            log_users_1h=np.log1p(9),
            rank_log_users_1h=1.0,
        ),
        "monsters",
        tag__gothic=1.0,
    )
    assert len(told) == MAX_REASONS
    assert told[:2] == ["matches 'monsters'", "because you liked Dracula"]


def test_evidence_is_gathered_from_what_the_user_and_others_did() -> None:
    books = [
        Item(item_id=ItemId(name), title=name.title(), tags=["gothic"])
        for name in ("dracula", "emma", "gone", "carmilla")
    ]
    catalogue, table, me, other = Catalogue(), CounterTable(), Profile(UserId("me")), Profile(UserId("other"))
    for book in books:
        catalogue.apply_item(book.item_id, encode(book), NOW_MS)

    def act(profile: Profile, name: str, action: Action, at_ms: int) -> None:
        ids = {"event_id": EventId(f"{name}-{at_ms}"), "user_id": profile.user_id, "item_id": ItemId(name)}
        fold_event(Click(occurred_at=at_ms, action=action, **ids), profile, table, catalogue.item(ItemId(name)))

    for profile, name, action in ((other, "emma", "click"), (other, "carmilla", "click"), (me, "dracula", "save")):
        act(profile, name, action, NOW_MS)
    act(me, "emma", "click", NOW_MS + 1)
    for item_id in table.dirty:
        catalogue.apply_stats(f"0:{item_id}", encode(item_stats(item_id, 0, table.items[item_id])), NOW_MS)
    catalogue.apply_item("gone", None, NOW_MS)

    vectors = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0], [0.8, 0.6]], dtype=np.float32)
    rows, recent = np.array([3, 2]), [ItemId("emma"), ItemId("dracula")]
    cosines = make_cosines(vectors[rows], None, None, vectors[[1, 0]])
    features = compute_features(catalogue, rows, me, None, False, cosines, NOW_MS)
    found = gather_evidence(
        catalogue, rows, features, ["user", "user"], [False, False], me, vectors[rows], recent, vectors[[1, 0]], NOW_MS
    )
    assert found[1] is None
    first = found[0]
    assert first is not None
    assert (first.near_title, first.near_word, first.covisit_title) == ("Dracula", "loved", "Emma")
    assert explain(first, query=None, interests=now_interests(me, NOW_MS))[:2] == [
        "matches your interest in gothic",
        "because you loved Dracula",
    ]
