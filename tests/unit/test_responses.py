"""What a user made of what was shown to them, by topic."""

import pytest

from tailrace.ids import ItemId, UserId
from tailrace.profile import INTEREST_HALF_LIFE_MS, Profile, apply_seen
from tailrace.responses import Responses, gather_responses, sum_over, topic_columns, topic_pulls
from tailrace.topic_index import Topics

NOW_MS = 1_790_000_000_000
TOPICS = {
    **{ItemId(f"ghost-{number}"): ("tag:gothic", "author:A") for number in range(40)},
    **{ItemId(f"war-{number}"): ("tag:war",) for number in range(40)},
}


def responses(
    shown: dict[str, int], clicked: dict[str, int], *, at_ms: int = NOW_MS, now_ms: int = NOW_MS
) -> Responses:
    """Of a user who was shown the first so many items of each kind, and clicked the first so many."""
    profile = Profile(UserId("u"))
    for strand, counts in ((profile.impressions, shown), (profile.clicks, clicked)):
        for kind, count in counts.items():
            for number in range(count):
                apply_seen(strand, ItemId(f"{kind}-{number}"), at_ms)
    return gather_responses(profile, lambda item_id: TOPICS.get(item_id, ()), now_ms)


def test_a_tag_passed_over_responds_less_than_one_never_shown() -> None:
    found = responses({"ghost": 30, "war": 30}, {"ghost": 4})
    assert found.log_lift["tag:gothic"] > 0 > found.log_lift["tag:war"]
    assert found.shown["tag:war"] == 30
    assert "tag:travel" not in found.log_lift


def test_a_tag_shown_often_and_clicked_once_responds_less_than_one_shown_once_and_clicked() -> None:
    often = responses({"ghost": 40, "war": 10}, {"ghost": 1}).log_lift["tag:gothic"]
    once = responses({"ghost": 1, "war": 10}, {"ghost": 1}).log_lift["tag:gothic"]
    assert often < 0 < once


def test_evidence_fades_towards_none_and_few_showings_say_little() -> None:
    strong = responses({"war": 40}, {}).log_lift["tag:war"]
    faded = responses({"war": 40}, {}, now_ms=NOW_MS + round(5 * INTEREST_HALF_LIFE_MS)).log_lift["tag:war"]
    few = responses({"war": 1}, {}).log_lift["tag:war"]
    assert strong < faded < 0 and strong < few < 0


def test_clicks_without_impressions_tell_nothing_and_unknown_items_do_no_harm() -> None:
    assert responses({}, {"ghost": 20}).log_lift == {}
    found = responses({"unknown": 5, "ghost": 2}, {"ghost": 20, "unknown": 3})
    assert found.log_lift.keys() == {"tag:gothic", "author:A"}
    assert found.log_lift["tag:gothic"] > 0
    assert found.log_lift == responses({"unknown": 5, "ghost": 2}, {"ghost": 2, "unknown": 3}).log_lift


def test_pull_of_a_topic_is_what_it_adds_to_an_item_that_has_it_alone() -> None:
    weights = {"tag_affinity": 6.0, "tag_response": 28.0, "entity_affinity": 2.0, "entity_response": 3.5}
    interests = {"tag:gothic": 3.0, "tag:war": -4.0, "author:A": 2.0}
    known = responses({"ghost": 30, "war": 30}, {"ghost": 4})
    for topic, pull in topic_pulls(interests, known, weights).items():
        topics = Topics(tags=(topic,)) if topic.startswith("tag:") else Topics(entities=(topic,))
        columns = topic_columns([topics], interests, known)
        assert pull == pytest.approx(sum(weight * columns[name][0] for name, weight in weights.items()))


def test_sums_are_over_each_items_topics_by_the_root_of_their_number() -> None:
    sums_N = sum_over({"a": 2.0, "b": -1.0}, [("a", "b", "c", "d"), (), ("a",)])
    assert sums_N.tolist() == [0.5, 0.0, 2.0]
    assert sum_over({"a": 1.0}, []).shape == (0,)
