"""What the watchdog counts: shown and clicked by version, and what replicas tell, which may start again at zero."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from tailrace.events import Click, Impression, Ranked
from tailrace.ids import ModelVersion
from tailrace.pointer import Pointer
from tailrace.settings import GateSettings
from training.live_evidence import SETTLED_S, LiveEvidence, ReplicaStatus, VersionCounts
from training.watchdog import Watch

NOW = datetime(2026, 11, 23, 1, tzinfo=UTC)
V1, V2 = ModelVersion("v1"), ModelVersion("v2")


def impression(
    request: str = "r1", version: str = "v1", user: str = "u", items: str = "abc", degraded: str = "none"
) -> Impression:
    ranked = [Ranked(item_id=item, text="", features="", score=0.0, source="user") for item in items]
    return Impression(
        event_id=request,
        request_id=request,
        user_id=user,
        occurred_at=0,
        model_version=version,
        feature_names_hash="",
        user_text="",
        shown=ranked,
        degraded=degraded,
    )


def click(item: str = "a", request: str | None = "r1", *, after_s: float = 0.001, **fields: Any) -> Click:
    at_ms = round(after_s * 1000)
    return Click(event_id="e", user_id="u", occurred_at=at_ms, item_id=item, request_id=request, **fields)


def counted(evidence: LiveEvidence, version: str = "v1") -> tuple[int, int, int]:
    """Impressions, items shown, items clicked."""
    found = evidence.so_far(ModelVersion(version))
    return found.impressions, int(found.shown_G.sum()), int(found.clicked_G.sum())


def test_a_click_counts_for_the_version_of_the_impression_it_names() -> None:
    evidence = LiveEvidence()
    evidence.add_impression(impression("r1", "v1"))
    evidence.add_impression(impression("r2", "v2", items="ab"))
    evidence.add_click(click("a", "r2"))
    assert counted(evidence, "v1") == (1, 3, 0)
    assert counted(evidence, "v2") == (1, 2, 1)


def test_an_item_is_clicked_once_and_a_retried_impression_is_shown_once() -> None:
    evidence = LiveEvidence()
    for _ in range(2):
        evidence.add_impression(impression())
        evidence.add_click(click("a"))
        evidence.add_click(click("a", action="purchase"))
    assert counted(evidence) == (1, 3, 1)


@pytest.mark.parametrize(
    "other",
    [click(action=action) for action in ("skip", "hide", "view")] + [click("other"), click("other", None)],
)
def test_what_is_no_click_on_what_was_shown_does_not_count(other: Click) -> None:
    evidence = LiveEvidence()
    evidence.add_impression(impression())
    evidence.add_click(other)
    assert counted(evidence) == (1, 3, 0)


def test_a_click_that_names_no_request_is_of_the_users_latest_impression_of_the_item() -> None:
    now_s = [0.0]
    evidence = LiveEvidence(lambda: now_s[0])
    evidence.add_impression(impression("r1", "v1", items="ab"))
    evidence.add_impression(impression("r2", "v2", items="ac"))
    evidence.add_impression(impression("r3", "v3", items="ab", user="someone else"))
    evidence.add_click(click("a", None))
    evidence.add_click(click("a", None, action="purchase"))  # of the same impression, and counted already
    assert [counted(evidence, version)[2] for version in ("v1", "v2", "v3")] == [0, 1, 0]
    evidence.add_click(click("b", None))
    assert [counted(evidence, version)[2] for version in ("v1", "v2", "v3")] == [1, 1, 0]
    now_s[0] = 1801.0
    evidence.add_click(click("c", None))
    assert [counted(evidence, version)[2] for version in ("v1", "v2", "v3")] == [1, 1, 0], "too long ago"


def test_what_is_remembered_of_impressions_and_their_users_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.live_evidence._MAX_WAITING", 3)
    evidence = LiveEvidence()
    for number in range(40):
        evidence.add_impression(impression(f"r{number}", user=f"u{number % 7}"))
        evidence.add_click(click("a", f"early-{number}"))
    for held in (evidence._waiting, evidence._of_user, evidence._unsettled, evidence._early):
        assert len(held) == 3


def test_a_click_that_comes_before_its_impression_counts_with_it() -> None:
    evidence = LiveEvidence()
    evidence.add_click(click("b"))
    assert counted(evidence) == (0, 0, 0)
    evidence.add_impression(impression())
    evidence.add_click(click("b"))
    assert counted(evidence) == (1, 3, 1)


def test_one_user_is_always_in_one_group() -> None:
    evidence = LiveEvidence()
    for number in range(20):
        evidence.add_impression(impression(f"r{number}", user="same"))
    assert (evidence.so_far(V1).shown_G > 0).sum() == 1
    for number in range(500):
        evidence.add_impression(impression(f"s{number}", user=f"u{number}"))
    assert (evidence.so_far(V1).shown_G > 0).all()


def status(replica: str = "a", refused: dict[str, str] | None = None, **requests: int) -> ReplicaStatus:
    return ReplicaStatus(
        replica=replica,
        refused={ModelVersion(version): why for version, why in (refused or {}).items()},
        versions={
            ModelVersion(version): VersionCounts(requests=count, below_top=count // 10, errors=0, score_p50_ms=5.0)
            for version, count in requests.items()
        },
    )


def test_replicas_are_added_up_and_what_they_had_counted_before_is_left_out() -> None:
    evidence = LiveEvidence()
    evidence.add_statuses([status("a", v1=1000), status("b", v1=500)])
    assert evidence.so_far(V1).requests == 0
    evidence.add_statuses([status("a", v1=1100), status("b", v1=520, v2=30)])
    evidence.add_statuses([])  # a gateway that heard of none in time
    evidence.add_statuses([status("a", v1=1100), status("b", v1=540, v2=30)])
    assert (evidence.so_far(V1).requests, evidence.so_far(V1).below_top) == (140, 14)
    assert (evidence.so_far(V2).requests, evidence.so_far(V2).score_p50_ms) == (30, 5.0)


def test_a_replica_that_begins_anew_adds_what_it_counts_from_then_on() -> None:
    evidence = LiveEvidence()
    evidence.add_statuses([status("a", v1=1000)])
    evidence.add_statuses([status("a", v1=40)])  # loaded anew
    evidence.add_statuses([status("c", v1=20)])  # another in its place
    assert evidence.so_far(V1).requests == 60


def test_a_refusal_is_known_until_it_is_taken_back() -> None:
    evidence = LiveEvidence()
    evidence.add_statuses([status("a"), status("b", refused={"v2": "damaged"})])
    assert evidence.so_far(V2).refused == "damaged"
    evidence.add_statuses([status("a"), status("b")])
    assert evidence.so_far(V2).refused == ""


# -- what is on trial ----------------------------------------------------------------------------------------------


def pointer(generation: int, **fields: Any) -> Pointer:
    found: dict[str, Any] = {"champion": V1, "history": [], "reason": "promote", **fields}
    return Pointer(generation=generation, updated_at=datetime(2026, 11, 23, tzinfo=UTC), **found)


def settled(evidence: LiveEvidence, version: str = "v1") -> tuple[int, int, int]:
    """Impressions, items shown, items clicked, of what has settled."""
    found = evidence.settled(ModelVersion(version))
    return found.impressions, int(found.shown_G.sum()), int(found.clicked_G.sum())


def test_settled_evidence_gives_every_impression_the_same_time_for_its_clicks() -> None:
    now_s = [0.0]
    evidence = LiveEvidence(lambda: now_s[0])
    evidence.add_impression(impression("r1"))
    now_s[0] = 30.0
    evidence.add_click(click("a", "r1", after_s=30))
    evidence.add_impression(impression("r2"))
    assert (counted(evidence), settled(evidence)) == ((2, 6, 1), (0, 0, 0))
    now_s[0] = 65.0
    evidence.add_click(click("b", "r1", after_s=65))  # too late for the one count, not for the other
    assert (counted(evidence), settled(evidence)) == ((2, 6, 2), (0, 0, 0))
    now_s[0] = 70.0
    assert settled(evidence) == (1, 3, 1)
    now_s[0] = 100.0
    assert settled(evidence) == (2, 6, 1)
    evidence.begin()
    assert (counted(evidence), settled(evidence)) == ((0, 0, 0), (0, 0, 0))


def test_settled_evidence_is_the_same_when_it_is_heard_late_and_none_where_there_was_a_gap() -> None:
    now_s = [0.0]
    evidence = LiveEvidence(lambda: now_s[0])
    for number in range(10):  # all at once, after a stall
        evidence.add_impression(impression(f"r{number}"))
        evidence.add_click(click("a", f"r{number}", after_s=20.0 * number))
    now_s[0] = 100.0
    assert settled(evidence) == (10, 30, 4)  # after 0, 20, 40 and 60 seconds
    evidence.add_impression(impression("lost"))
    evidence.break_off()
    now_s[0] = 200.0
    assert settled(evidence) == (10, 30, 4)


def test_slates_that_the_model_was_too_late_for_say_nothing_of_it() -> None:
    now_s = [0.0]
    evidence = LiveEvidence(lambda: now_s[0])
    for number, rung in enumerate(("none", "no_profile", "no_text", "popular")):
        evidence.add_impression(impression(f"r{number}", degraded=rung))
    now_s[0] = 100.0
    assert (counted(evidence)[0], settled(evidence)[0]) == (4, 2)


def test_each_impression_has_its_time_however_many_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.live_evidence._MAX_WAITING", 100)
    now_s = [0.0]
    evidence = LiveEvidence(lambda: now_s[0])
    for second in range(200):
        now_s[0] = float(second)
        for number in range(50):
            evidence.add_impression(impression(f"r{second}-{number}"))
            evidence.add_click(click("a", f"r{second - 30}-{number}", after_s=30))
    assert settled(evidence) == (100, 300, 100)


def failing(version: str, requests: int, errors: int) -> ReplicaStatus:
    counts = VersionCounts(requests=requests, below_top=errors, errors=errors, score_p50_ms=5.0)
    return ReplicaStatus(replica="a", refused={}, versions={ModelVersion(version): counts})


def test_first_champion_and_pinned_champion_are_not_on_trial() -> None:
    watched = Watch(GateSettings())
    assert watched.judge(NOW) is None
    watched.follow(pointer(1))
    assert watched.judge(NOW) is None
    watched.follow(pointer(2, champion=V2, history=[V1], reason="pin", pinned=True))
    assert watched.judge(NOW) is None


def test_promoted_champion_is_compared_with_what_is_remembered_of_the_one_before() -> None:
    for errors_before, action in ((0, "rollback"), (80, "wait")):
        watched = Watch(GateSettings())
        watched.follow(pointer(1))
        watched.evidence.add_statuses([failing("v1", 0, 0)])
        watched.evidence.add_statuses([failing("v1", 200, errors_before)])
        watched.follow(pointer(2, champion=V2, history=[V1]))
        watched.evidence.add_statuses([failing("v2", 100, 40)])
        judged = watched.judge(NOW)
        assert judged is not None
        assert (judged[0], judged[1].action) == (V2, action)


def test_champion_that_was_rolled_back_to_is_trusted() -> None:
    watched = Watch(GateSettings())
    watched.follow(pointer(3, history=[V2], reason="rollback"))
    watched.evidence.add_statuses([failing("v1", 0, 0)])
    watched.evidence.add_statuses([failing("v1", 100, 100)])
    assert watched.judge(NOW) is None


@pytest.mark.parametrize(("clicked", "action"), [(1, "rollback"), (3, "wait")])
def test_promoted_champion_goes_when_it_loses_the_clicks_of_the_one_before(clicked: int, action: str) -> None:
    now_s = [0.0]
    watched = Watch(GateSettings(canary_impressions=300, max_click_loss=0.2))
    watched.evidence = LiveEvidence(lambda: now_s[0])

    def serve(version: ModelVersion, visits: int, clicked: int) -> None:
        """Of every four slates of three items, `clicked` have one click."""
        for number in range(visits):
            request = f"{version}-{number}-{now_s[0]}"
            shown = impression(request, version, user=f"u{number % 200}")
            watched.evidence.add_impression(shown)
            if number * 7 % 4 < clicked:
                watched.evidence.add_click(click("a", request))

    watched.follow(pointer(1))
    watched.evidence.add_statuses([failing("v1", 0, 0)])
    serve(V1, 600, 4)
    now_s[0] += 2 * SETTLED_S
    watched.follow(pointer(2, champion=V2, history=[V1]))
    serve(V2, 600, clicked)
    found = watched.judge(NOW)
    assert found is not None and found[1].action == "wait", "clicks are yet to come"
    now_s[0] += 2 * SETTLED_S
    found = watched.judge(NOW)
    assert found is not None and (found[0], found[1].action) == (V2, action)
    # A champion that has shown and answered enough is trusted.
    serve(V2, 600, clicked)
    watched.evidence.add_statuses([failing("v2", 1200, 0)])
    now_s[0] += 2 * SETTLED_S
    assert watched.judge(NOW) is None


def test_what_was_known_of_a_champion_outlives_a_spell_too_short_to_tell() -> None:
    now_s = [0.0]
    watched = Watch(GateSettings())
    watched.evidence = LiveEvidence(lambda: now_s[0])
    watched.follow(pointer(1))
    watched.evidence.add_statuses([failing("v1", 0, 0)])
    for number in range(600):
        watched.evidence.add_impression(impression(f"r{number}", user=f"u{number}"))
        watched.evidence.add_click(click("a", f"r{number}"))
    now_s[0] += 2 * SETTLED_S
    watched.follow(pointer(2, canary=V2, canary_share=0.2, reason="canary"))
    watched.evidence.add_statuses([failing("v1", 100, 0)])
    watched.follow(pointer(3, champion=V2, history=[V1]))  # by hand, at once
    for number in range(1100):
        watched.evidence.add_impression(impression(f"s{number}", "v2", user=f"u{number}"))
    now_s[0] += 2 * SETTLED_S
    found = watched.judge(NOW)
    assert found is not None and found[1].action == "rollback" and "of the clicks" in found[1].reason


def test_probation_ends_in_time() -> None:
    watched = Watch(GateSettings(max_canary_s=3600.0))
    at = pointer(2, champion=V2, history=[V1])
    watched.follow(at)
    assert watched.judge(at.updated_at + timedelta(seconds=3599)) is not None
    assert watched.judge(at.updated_at + timedelta(seconds=3601)) is None


def test_counts_begin_anew_with_the_canary_so_that_both_are_judged_on_the_same_time() -> None:
    watched = Watch(GateSettings())
    watched.follow(pointer(1))
    watched.evidence.add_impression(impression())
    watched.evidence.add_statuses([failing("v1", 0, 0)])
    watched.evidence.add_statuses([failing("v1", 100, 0)])
    watched.follow(pointer(2, canary=V2, canary_share=0.2, reason="canary"))
    assert (watched.evidence.so_far(V1).requests, watched.evidence.so_far(V1).impressions) == (0, 0)
    watched.evidence.add_statuses([failing("v1", 150, 0)])
    assert watched.evidence.so_far(V1).requests == 50
    judged = watched.judge(NOW)
    assert judged is not None
    assert (judged[0], judged[1].action) == (V2, "wait")


def test_canary_that_nobody_meets_is_taken_back_in_time() -> None:
    watched = Watch(GateSettings(max_canary_s=3600.0))
    at = pointer(2, canary=V2, canary_share=0.2, reason="canary")
    watched.follow(at)
    for waited_s, action in ((3599, "wait"), (3601, "rollback")):
        judged = watched.judge(at.updated_at + timedelta(seconds=waited_s))
        assert judged is not None and judged[1].action == action
