"""The loop closed over the real thing: HTTP impressions, Kafka clicks, a round as a Ray job, a swap, a canary."""

import threading
import time

import pytest
from msgspec.structs import replace

from deploy.training_job import count_impressions, train_by_schedule, train_once
from tailrace.errors import NothingToLearn, RoundRunning
from tailrace.rounds import RoundRecord, open_round_log
from tailrace.settings import Settings
from tests.e2e.scene import Scene, new_user, until
from training.schedule import Schedule


def of_a_trial(scene: Scene) -> Settings:
    """Settings under which a few dozen slates are enough to learn from, and to be let through."""
    settings = scene.settings
    return replace(
        settings,
        training=replace(
            settings.training,
            min_examples=60,
            wait_s=0.0,
            holdout_share=0.5,
            epochs=2,
            trainable_layers=0,
            threads=1,
        ),
        gate=replace(
            settings.gate,
            margin=1.0,
            better_confidence=0.0,
            canary_share=0.5,
            max_latency_ratio=10.0,
            canary_impressions=10**6,
        ),
    )


def read_ghost_stories(scene: Scene, visits: int) -> None:
    """Readers who open whatever speaks of ghosts, and say so over HTTP."""
    for _ in range(visits):
        user = new_user()
        answer = scene.recommend(user, n=8, query="ghosts and machines")
        clicks = [
            {
                "type": "click",
                "user_id": user,
                "item_id": item["item_id"],
                "request_id": answer["request_id"],
                "position": item["position"],
            }
            for item in answer["items"]
            if "Ghosts" in item["title"]
        ]
        if clicks:
            assert scene.client.post("/v1/events", json=clicks).json()["accepted"] == len(clicks)


@pytest.mark.timeout(300)
def test_clicks_become_a_challenger_that_serves_its_share_without_a_restart(scene: Scene) -> None:
    settings = of_a_trial(scene)
    before = count_impressions(settings)
    read_ghost_stories(scene, 90)
    until(lambda: count_impressions(settings), lambda count: count >= before + 90)
    ended: list[RoundRecord] = []
    stop = threading.Event()
    job = threading.Thread(
        target=train_by_schedule,
        args=(settings, Schedule(after_examples=90)),
        kwargs={"stop": stop, "ended": ended.append},
    )
    job.start()
    try:
        # Somebody asks all the while, and nobody is refused.
        deadline = time.monotonic() + 240
        while not ended and time.monotonic() < deadline:
            assert scene.recommend(new_user(), dry_run=True)["items"]
        [record] = ended
        assert record.outcome == "canary", record.reason
        with pytest.raises(RoundRunning, match="already"):
            train_once(settings)
        until(lambda: scene.everywhere("canary"), lambda canary: canary == record.version, timeout_s=60)
        assert scene.everywhere("serving") == record.parent
        versions = {scene.recommend(new_user(), dry_run=True)["model_version"] for _ in range(30)}
        assert versions == {record.version, record.parent}
    finally:
        stop.set()
        job.join(60)
    assert open_round_log(settings).newest(1) == [record]
    scene.registry.rollback()
    until(scene.statuses, lambda found: [one["canary"] for one in found] == [None, None], timeout_s=60)


def test_round_with_too_little_feedback_changes_nothing_and_says_so(scene: Scene) -> None:
    settings = of_a_trial(scene)
    demanding = replace(settings, training=replace(settings.training, min_examples=10**6))
    pointer = scene.registry.pointer()
    with pytest.raises(NothingToLearn, match="1000000"):
        train_once(demanding)
    assert scene.registry.pointer() == pointer
