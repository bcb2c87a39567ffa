"""The running system, measured from outside: click to visible, and request latency at three rates.

Everything is real: Kafka, Ray, LMDB, the int8 model, HTTP on loopback; clients share the machine with the system.
"""

import asyncio
import tempfile
import time
import uuid
from collections import Counter
from typing import Any

import httpx
import numpy as np
from rich.console import Console
from rich.progress import track

from deploy.demo import announce_books, wait_until_ready
from deploy.local import local_system
from tailrace.events import Click, encode
from tailrace.ids import EventId, ItemId, UserId
from tailrace.kafka_clients import open_producer
from tailrace.settings import load_settings
from tailrace.topics import tailrace_topics
from tests.bench.report import Row
from tests.servers import free_port

_CLICKS = 500  # of each path, through each of two eyes
_USERS = 50
_RATES = (1, 10, 20)
_RATE_S = 20.0


def bench_system(console: Console) -> list[Row]:
    """Returns click-to-visible and request latencies of a fresh system with the bundled catalogue."""
    with tempfile.TemporaryDirectory(prefix="tailrace-bench-") as folder:
        settings = load_settings(
            None, data_dir=folder, gateway={"port": free_port()}, stream={"metrics_port": free_port()}
        )
        with local_system(settings, lambda line: console.print(f"[dim]{line}[/]")) as running:
            producer = open_producer(running.kafka, linger_ms=0)
            items = announce_books(producer, running)
            url = f"http://{running.gateway.host}:{running.gateway.port}"
            topic = tailrace_topics(running.kafka)["clicks"].name

            def send(click: Click) -> None:
                producer.send(topic, key=click.user_id.encode(), value=encode(click)).get(timeout=10)

            try:
                return asyncio.run(_measure(url, [item.item_id for item in items], send))
            finally:
                producer.close()


async def _measure(url: str, item_ids: list[ItemId], send: Any) -> list[Row]:
    async with httpx.AsyncClient(base_url=url, timeout=10.0) as client:
        await wait_until_ready(client, len(item_ids))
        await _warm_up(client)
        rows = await _click_to_visible(client, item_ids, send)
        for rate in _RATES:
            rows += await _request_latency(client, rate)
    return rows


async def _warm_up(client: httpx.AsyncClient) -> None:
    for number in range(50):
        (await client.post("/v1/recommendations", json={"user_id": f"warm-{number % 5}", "n": 10})).raise_for_status()


async def _click_to_visible(client: httpx.AsyncClient, item_ids: list[ItemId], send: Any) -> list[Row]:
    """Half of the clicks go over HTTP, half straight to Kafka; visible is when a ranking reflects them."""
    profile_ms: dict[str, list[float]] = {"HTTP": [], "Kafka": []}
    ranking_ms: dict[str, list[float]] = {"HTTP": [], "Kafka": []}
    sent: Counter[str] = Counter()
    run = uuid.uuid4().hex[:8]
    for number in track(range(4 * _CLICKS), "click to visible"):
        path = "HTTP" if number % 2 else "Kafka"
        # Each fourth click is seen through rankings alone; the others through the profile a ranking would read.
        through_rankings = number % 4 < 2
        user_id = UserId(f"{run}-{path}-{number % _USERS}-{through_rankings}")
        sent[user_id] += 1
        click = Click(
            event_id=EventId(uuid.uuid4().hex),
            user_id=user_id,
            item_id=item_ids[(number * 7) % len(item_ids)],
            occurred_at=int(time.time() * 1000),
        )
        started = time.perf_counter()
        if path == "HTTP":
            body = b'{"type":"click",' + encode(click)[1:]
            answer = await client.post("/v1/events", content=body, headers={"content-type": "application/json"})
            answer.raise_for_status()
        else:
            await asyncio.to_thread(send, click)
        while time.perf_counter() - started < 5.0:
            if await _events_seen(client, user_id, through_rankings) >= sent[user_id]:
                found = ranking_ms if through_rankings else profile_ms
                found[path].append((time.perf_counter() - started) * 1000)
                break
        else:
            raise AssertionError(f"a click of {user_id} was not visible within 5 s")
        await asyncio.sleep(0.01)
    rows: list[Row] = []
    for path in ("Kafka", "HTTP"):
        rows += _latency_rows(f"click over {path} to the profile a ranking reads", profile_ms[path])
        rows += _latency_rows(f"click over {path} to a finished ranking that reflects it", ranking_ms[path])
    return rows


async def _events_seen(client: httpx.AsyncClient, user_id: UserId, through_rankings: bool) -> int:
    if through_rankings:
        answer = await client.post("/v1/recommendations", json={"user_id": user_id, "n": 10, "dry_run": True})
        answer.raise_for_status()
        return int(answer.json()["profile_events"])
    answer = await client.get(f"/v1/users/{user_id}/profile")
    return int(answer.json()["events"]) if answer.status_code == 200 else 0


async def _request_latency(client: httpx.AsyncClient, rate: int) -> list[Row]:
    """Requests leave on a fixed schedule whether or not earlier ones have returned, so waiting is counted."""
    taken_ms: list[float] = []
    degraded: Counter[str] = Counter()

    async def ask(number: int) -> None:
        started = time.perf_counter()
        answer = await client.post("/v1/recommendations", json={"user_id": f"load-{number % 200}", "n": 10})
        taken_ms.append((time.perf_counter() - started) * 1000)
        degraded[answer.json()["degraded"] if answer.status_code == 200 else str(answer.status_code)] += 1

    async with asyncio.TaskGroup() as requests:
        begin = time.perf_counter()
        for number in range(int(rate * _RATE_S)):
            await asyncio.sleep(max(begin + number / rate - time.perf_counter(), 0.0))
            requests.create_task(ask(number))
    rows = _latency_rows(f"request at {rate} per second", taken_ms)
    share = 100 * degraded["none"] / max(sum(degraded.values()), 1)
    return [*rows, {"name": f"request at {rate} per second, answered from the top rung", "value": share, "unit": "%"}]


def _latency_rows(name: str, samples_ms: list[float]) -> list[Row]:
    p50, p99 = np.percentile(np.asarray(samples_ms), [50, 99])
    return [
        {"name": f"{name}, p50", "value": float(p50), "unit": "ms"},
        {"name": f"{name}, p99 of {len(samples_ms)}", "value": float(p99), "unit": "ms"},
    ]
