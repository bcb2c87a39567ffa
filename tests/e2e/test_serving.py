"""The service as a whole, over HTTP and Kafka."""

import asyncio
import os
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import pytest

from tailrace.ids import ModelVersion
from tailrace.registry import announce
from tests.bundles import retouch_graph
from tests.e2e.scene import Scene, book, kill_replicas, new_user, until
from tests.servers import listening_beyond_loopback


def test_answer_carries_all_that_apps_are_promised(scene: Scene) -> None:
    answer = scene.recommend(new_user(), n=5, query="a tale about ghosts", explain=True)
    assert answer["model_version"] in ("v1", "v2") and answer["degraded"] == "none"
    assert answer["profile_events"] == 0 and answer["profile_age_ms"] is None and answer["took_ms"] > 0
    assert [item["position"] for item in answer["items"]] == [0, 1, 2, 3, 4]
    assert all(item["reasons"] for item in answer["items"]) and {"encode", "score", "slate"} <= answer["timings"].keys()
    assert any("Ghosts" in item["title"] for item in answer["items"])


def test_nothing_listens_beyond_loopback(scene: Scene) -> None:
    assert listening_beyond_loopback(os.getpid()) == []


def test_click_changes_the_users_next_ranking(scene: Scene) -> None:
    user = new_user()
    before = scene.recommend(user, n=10)
    clicked = before["items"][0]["item_id"]
    event = {"type": "click", "user_id": user, "item_id": clicked, "request_id": before["request_id"], "position": 0}
    posted = scene.client.post("/v1/events", json=[event])
    assert posted.status_code == 200 and posted.json()["accepted"] == 1, posted.text
    after = until(
        lambda: scene.recommend(user, n=10, explain=True, dry_run=True),
        lambda answer: clicked not in [item["item_id"] for item in answer["items"]],
    )
    assert after["profile_events"] >= 1
    page = scene.client.get(f"/v1/users/{user}/profile").json()
    assert page["recent"][0]["item_id"] == clicked and page["interests"][0]["weight"] > 0


def test_impression_is_logged_and_folded_into_the_profile(scene: Scene) -> None:
    user = new_user()
    scene.recommend(user, n=3)
    page = until(
        lambda: scene.client.get(f"/v1/users/{user}/profile"), lambda response: response.status_code == 200
    ).json()
    assert page["counts"] == {"shown": 3}


def test_dry_run_leaves_no_impression(scene: Scene) -> None:
    user = new_user()
    scene.recommend(user, n=3, dry_run=True)
    # Another request of the same user, whose impression goes the same way later, is all there is.
    scene.recommend(user, n=2)
    page = until(
        lambda: scene.client.get(f"/v1/users/{user}/profile"), lambda response: response.status_code == 200
    ).json()
    assert page["counts"] == {"shown": 2}


def test_new_item_is_recommendable_within_two_seconds(scene: Scene) -> None:
    number = 1000 + int(uuid4().int % 10_000)
    item = book(number)
    started = time.monotonic()
    scene.produce_items([item])
    until(
        lambda: scene.recommend(new_user(), candidates=[item.item_id], dry_run=True)["items"],
        lambda items: [found["item_id"] for found in items] == [item.item_id],
        timeout_s=2.0,
    )
    assert time.monotonic() - started < 2.0
    similar = scene.client.get(f"/v1/items/{item.item_id}/similar", params={"n": 3}).json()
    assert similar["degraded"] == "none" and len(similar["items"]) == 3


def test_forgotten_user_is_unknown(scene: Scene) -> None:
    user = new_user()
    event = {"type": "rating", "user_id": user, "item_id": "book-3", "value": 5}
    assert scene.client.post("/v1/events", json=event).status_code == 200
    profile = f"/v1/users/{user}/profile"
    until(lambda: scene.client.get(profile).status_code, lambda status: status == 200)
    assert scene.client.delete(profile).status_code == 202
    until(lambda: scene.client.get(profile).status_code, lambda status: status == 404)


def test_swap_in_place_fails_no_request_and_no_answer_after_it_is_old(scene: Scene) -> None:
    serving = scene.everywhere("serving")
    other = ModelVersion("v2" if serving == "v1" else "v1")
    swaps = {status["replica"]: status["swaps"] for status in scene.statuses()}
    answers: list[tuple[float, int, str, str]] = []  # sent at, status, version, rung

    async def ask_until(client: httpx.AsyncClient, done: asyncio.Event) -> None:
        while not done.is_set():
            sent_at = time.monotonic()
            response = await client.post("/v1/recommendations", json={"user_id": new_user(), "dry_run": True})
            answer = response.json()
            answers.append((sent_at, response.status_code, answer.get("model_version"), answer.get("degraded")))

    async def wait_for(num_answers: int, version: str) -> None:
        async with asyncio.timeout(60):
            while sum(found[2] == version for found in answers) < num_answers:
                await asyncio.sleep(0.02)

    async def swap() -> float:
        done = asyncio.Event()
        async with httpx.AsyncClient(base_url=scene.client.base_url, timeout=20.0) as client:
            asking = [asyncio.create_task(ask_until(client, done)) for _ in range(2)]
            await wait_for(10, serving)
            await asyncio.to_thread(announce, scene.settings.kafka, scene.registry.promote(other))
            await asyncio.to_thread(until, lambda: scene.everywhere("serving"), lambda found: found == other, 60.0)
            flipped_at = time.monotonic()
            await wait_for(10, other)
            done.set()
            await asyncio.gather(*asking)
        return flipped_at

    flipped_at = asyncio.run(swap())
    assert {(status, rung) for _, status, _, rung in answers} == {(200, "none")}
    assert {version for _, _, version, _ in answers} == {serving, other}
    assert {version for sent_at, _, version, _ in answers if sent_at > flipped_at} == {other}
    assert {status["replica"]: status["swaps"] - 1 for status in scene.statuses()} == swaps


def test_overload_is_answered_429_with_retry_after_and_does_not_pile_up(scene: Scene) -> None:
    async def flood() -> list[tuple[int, str | None, str, float]]:
        async def one(client: httpx.AsyncClient) -> tuple[int, str | None, str, float]:
            started = time.monotonic()
            response = await client.post("/v1/recommendations", json={"user_id": new_user(), "dry_run": True})
            kind = response.headers["content-type"]
            return response.status_code, response.headers.get("retry-after"), kind, time.monotonic() - started

        limits = httpx.Limits(max_connections=100)
        async with httpx.AsyncClient(base_url=scene.client.base_url, timeout=30.0, limits=limits) as client:
            return await asyncio.gather(*(one(client) for _ in range(80)))

    answers = asyncio.run(flood())
    refused = [answer for answer in answers if answer[0] == 429]
    assert {status for status, _, _, _ in answers} == {200, 429}
    assert refused and all(retry == "1" and kind == "application/problem+json" for _, retry, kind, _ in refused)
    # Once the flood is over, the next request finds an empty queue.
    started = time.monotonic()
    assert scene.recommend(new_user(), dry_run=True)["degraded"] == "none"
    assert time.monotonic() - started < 5.0
    metrics = scene.client.get("/metrics").text
    assert re.search(r'tailrace_http_requests_total\{.*route="/v1/recommendations",status="429"\}', metrics)


def test_damaged_bundle_leaves_the_running_model_and_says_so(scene: Scene, tmp_path: Path) -> None:
    version = ModelVersion("v3")
    scene.registry.publish(retouch_graph(scene.bundle, tmp_path / "bundle", "scorer"), version=version)
    announcement = scene.registry.promote(version)
    damaged = Path(scene.registry.url) / "bundles" / version / "int8" / "scorer.onnx"
    data = bytearray(damaged.read_bytes())
    data[len(data) // 2] ^= 1
    damaged.write_bytes(data)
    serving = scene.everywhere("serving")
    announce(scene.settings.kafka, announcement)
    found = until(scene.statuses, lambda found: [version in status["refused"] for status in found] == [True, True])
    assert all("scorer.onnx" in status["refused"][version] for status in found)
    assert scene.everywhere("serving") == serving
    assert scene.recommend(new_user(), dry_run=True)["model_version"] == serving
    announce(scene.settings.kafka, scene.registry.rollback())


@pytest.mark.parametrize("side", ["before the flip", "after the flip"])
def test_ranker_killed_during_a_swap_fails_no_request_and_comes_back_on_the_new_version(
    scene: Scene, side: str
) -> None:
    before = {status["replica"] for status in scene.statuses()}
    old = scene.everywhere("serving")
    other = ModelVersion("v2" if old == "v1" else "v1")
    answers: list[dict[str, Any]] = []
    done = threading.Event()

    def ask() -> None:
        while not done.is_set():
            answers.append(scene.recommend(new_user(), dry_run=True))  # which must be answered

    with ThreadPoolExecutor(1) as pool:
        asking = pool.submit(ask)
        try:
            announce(scene.settings.kafka, scene.registry.promote(other))
            # Loading aside takes about a second, in which the old one serves.
            until(
                scene.statuses,
                lambda found: any(
                    now["serving"] == other or (side == "before the flip" and now["loading"] == other) for now in found
                ),
                timeout_s=60,
            )
            kill_replicas("ranker")
            back = until(
                lambda: [found for found in scene.statuses() if found["replica"] not in before],
                lambda found: len(found) == len(before),
                timeout_s=60,
            )
            # What died before the flip has not half-flipped: its successor follows the pointer, and nothing else.
            assert all(one["serving"] == other and not one["refused"] for one in back)
            until(lambda: answers[-1], lambda last: last["degraded"] == "none" and last["model_version"] == other, 60)
        finally:
            done.set()
        asking.result()
    assert {answer["model_version"] for answer in answers} <= {old, other, "popular"}
    assert all(len(answer["items"]) == 10 for answer in answers)


def test_killed_gateway_comes_back(scene: Scene) -> None:
    kill_replicas("gateway")

    def ask() -> int:
        try:
            body = {"user_id": new_user(), "dry_run": True}
            return scene.client.post("/v1/recommendations", json=body).status_code
        except httpx.TransportError:
            return 0

    until(ask, lambda status: status == 200, timeout_s=60)
    until(lambda: scene.client.get("/readyz").status_code, lambda status: status == 200, timeout_s=30)
