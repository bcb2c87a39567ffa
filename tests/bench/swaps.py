"""Versions replaced under load, measured from outside: failed requests, added latency, time until replicas answer.

Requests leave on a fixed schedule all the while, over HTTP; two versions of the same weights take turns as champion.
"""

import asyncio
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np
from rich.console import Console
from rich.progress import Progress

from deploy.demo import announce_books, wait_until_ready
from deploy.local import local_system
from tailrace.ids import ModelVersion
from tailrace.kafka_clients import open_producer
from tailrace.registry import Registry, announce, open_registry
from tailrace.settings import KafkaSettings, load_settings
from tests.bench.report import Row
from tests.servers import free_port

_SWAPS = 200
_RATE = 10  # requests per second
_AFTER_S = 1.0  # requests sent up to this long after a swap are held against the others
_REST_S = 1.5  # between the end of that time and the next swap
_LOOK_S = 0.05
_OTHER = ModelVersion("v-other")


@dataclass(frozen=True)
class _Answer:
    sent_at: float
    took_ms: float
    status: int
    rung: str
    version: str


@dataclass(frozen=True)
class _Swap:
    """From the announcement to the flip of the last replica, monotonic seconds."""

    told_at: float
    flipped_at: float


def bench_swaps(console: Console, swaps: int = _SWAPS) -> list[Row]:
    """Returns what `swaps` swaps of the champion cost a fresh system with the bundled catalogue, under load."""
    with tempfile.TemporaryDirectory(prefix="tailrace-bench-") as folder:
        settings = load_settings(
            None, data_dir=folder, gateway={"port": free_port()}, stream={"metrics_port": free_port()}
        )
        with local_system(settings, lambda line: console.print(f"[dim]{line}[/]")) as running:
            producer = open_producer(running.kafka, linger_ms=0)
            num_items = len(announce_books(producer, running))
            producer.close()
            registry = open_registry(running)
            [first] = registry.versions()
            registry.publish(registry.fetch(first, Path(folder) / "fetched"), version=_OTHER, parent=first)
            url = f"http://{running.gateway.host}:{running.gateway.port}"
            turns = [(_OTHER, first)[number % 2] for number in range(swaps)]
            return asyncio.run(_measure(url, num_items, registry, running.kafka, turns, console))


async def _measure(
    url: str,
    num_items: int,
    registry: Registry,
    kafka: KafkaSettings,
    turns: list[ModelVersion],
    console: Console,
) -> list[Row]:
    answers: list[_Answer] = []
    made: list[_Swap] = []
    done = asyncio.Event()
    async with httpx.AsyncClient(base_url=url, timeout=10.0) as client:
        await wait_until_ready(client, num_items)
        load = asyncio.create_task(_load(client, answers, done))
        await asyncio.sleep(5.0)  # caches fill, and there is something to warm up on
        begun_at = time.monotonic()
        with Progress(console=console, transient=True) as progress:
            for version in progress.track(turns, description="swaps"):
                made.append(await _swap(client, registry, kafka, version))
                await asyncio.sleep(_AFTER_S + _REST_S)
        done.set()
        await load
    return _rows([answer for answer in answers if answer.sent_at >= begun_at], made)


async def _load(client: httpx.AsyncClient, answers: list[_Answer], done: asyncio.Event) -> None:
    """Asks on schedule, whether or not earlier requests have returned, so waiting is counted."""

    async def ask(number: int) -> None:
        sent_at = time.monotonic()
        try:
            response = await client.post("/v1/recommendations", json={"user_id": f"load-{number % 200}", "n": 10})
            status, body = response.status_code, response.json() if response.status_code == 200 else {}
        except httpx.HTTPError:
            status, body = 0, {}
        took_ms = (time.monotonic() - sent_at) * 1000
        answers.append(_Answer(sent_at, took_ms, status, str(body.get("degraded")), str(body.get("model_version"))))

    begin, number = time.monotonic(), 0
    async with asyncio.TaskGroup() as requests:
        while not done.is_set():
            requests.create_task(ask(number))
            number += 1
            await asyncio.sleep(max(begin + number / _RATE - time.monotonic(), 0.0))


async def _swap(client: httpx.AsyncClient, registry: Registry, kafka: KafkaSettings, version: ModelVersion) -> _Swap:
    announcement = await asyncio.to_thread(registry.promote, version)
    told_at = time.monotonic()
    await asyncio.to_thread(announce, kafka, announcement)
    while time.monotonic() - told_at < 60.0:
        replicas = (await client.get("/v1/models")).json()["replicas"]
        if replicas and all(replica["serving"] == version for replica in replicas):
            return _Swap(told_at, time.monotonic())
        await asyncio.sleep(_LOOK_S)
    raise AssertionError(f"{version} did not serve within 60 s")


def _rows(answers: list[_Answer], made: list[_Swap]) -> list[Row]:
    failed = sum(answer.status != 200 for answer in answers)
    degraded = sum(answer.status == 200 and answer.rung != "none" for answer in answers)
    began = np.array([swap.told_at for swap in made])
    ended = np.array([swap.flipped_at + _AFTER_S for swap in made])
    near = [bool(((began <= answer.sent_at) & (answer.sent_at < ended)).any()) for answer in answers]
    near_ms = [answer.took_ms for answer, is_near in zip(answers, near, strict=True) if is_near]
    other_ms = [answer.took_ms for answer, is_near in zip(answers, near, strict=True) if not is_near]
    near_p99, other_p99 = float(np.percentile(near_ms, 99)), float(np.percentile(other_ms, 99))
    took_s = np.array([swap.flipped_at - swap.told_at for swap in made])
    count = f"{len(made)} swaps at {_RATE} requests per second"
    return [
        {"name": f"{count}, failed requests of {len(answers)}", "value": float(failed), "unit": ""},
        {"name": f"{count}, answers below the top rung", "value": float(degraded), "unit": ""},
        {"name": f"{count}, request p99 from the announcement to 1 s after the swap", "value": near_p99, "unit": "ms"},
        {"name": f"{count}, request p99 otherwise", "value": other_p99, "unit": "ms"},
        {"name": f"{count}, added p99", "value": near_p99 - other_p99, "unit": "ms"},
        {"name": f"{count}, until all replicas answer with it, p50", "value": float(np.median(took_s)), "unit": "s"},
        {"name": f"{count}, until all replicas answer with it, longest", "value": float(took_s.max()), "unit": "s"},
    ]
