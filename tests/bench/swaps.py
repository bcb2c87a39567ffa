"""Versions replaced under load, measured from outside: failed requests, added latency, time until replicas answer.

Requests leave on a fixed schedule all the while, over HTTP, as many as leave the machine some room: near all that it
bears, whatever else it does would show as waiting. Two versions that differ as those of a round do by default, in the
head alone, take turns as champion. Each swap is held against the quiet that follows it: what is added is the
difference of the two p99, and its interval comes of drawing swaps again, each with its own quiet, so that a machine
that is slow for a while says nothing. Replicas are asked at the same pace near swaps and away from them.
"""

import asyncio
import contextlib
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import dataclass, field
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

SWAPS = 20
REPLICAS = 2
_BUSY = 0.4  # of the time is a request under way, if each takes as long as one alone
_MOST_RATE = 10  # requests per second
_ALONE = 30  # requests that tell how long one takes alone
_AFTER_S = 0.6  # requests sent up to this long after a swap are held against the others
_QUIET_S = 1.2  # what they are held against, before the next swap
_LOOK_S = 0.1
_RESAMPLES = 2000
_OTHER = ModelVersion("v-other")


@dataclass(frozen=True)
class _Answer:
    sent_at: float
    took_ms: float
    status: int
    rung: str


@dataclass(frozen=True)
class _Swap:
    """From the announcement to the flip of the last replica, and the end of the quiet after it; monotonic seconds."""

    told_at: float
    flipped_at: float
    quiet_until: float


@dataclass
class _Replicas:
    """When every replica was last seen to serve the same version, and which."""

    serving: str = ""
    changed: asyncio.Event = field(default_factory=asyncio.Event)


def bench_swaps(console: Console, swaps: int = SWAPS) -> list[Row]:
    """Returns what `swaps` swaps of the champion cost a fresh system with the bundled catalogue, under load."""
    with tempfile.TemporaryDirectory(prefix="tailrace-bench-") as folder:
        settings = load_settings(
            None,
            data_dir=folder,
            gateway={"port": free_port()},
            stream={"metrics_port": free_port()},
            ranker={"min_replicas": REPLICAS, "max_replicas": REPLICAS},
        )
        with local_system(settings, lambda line: console.print(f"[dim]{line}[/]")) as running:
            producer = open_producer(running.kafka, linger_ms=0)
            num_items = len(announce_books(producer, running))
            producer.close()
            registry = open_registry(running)
            [first] = registry.versions()
            _publish_sibling(registry, first, Path(folder))
            url = f"http://{running.gateway.host}:{running.gateway.port}"
            turns = [(_OTHER, first)[number % 2] for number in range(swaps)]
            # Whoever promotes is a process of its own, as in life: its work must not hold up who measures.
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as promoter:
                promoter.submit(os.getpid).result()  # it has imported what it needs
                return asyncio.run(_measure(url, num_items, promoter, registry.url, running.kafka, turns, console))


def _publish_sibling(registry: Registry, first: ModelVersion, folder: Path) -> None:
    """Publishes a version that makes a little else of what BERT says, as one does whose head has learned."""
    import torch  # only this needs it

    from training.export import export_bundle, load_ranker

    ranker, tokenizer, card = load_ranker(registry.fetch(first, folder / "fetched"))
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in ranker.head.parameters():
            weight.add_(1e-3 * weight.std(unbiased=False) * torch.randn(weight.shape))
    export_bundle(
        ranker,
        tokenizer,
        folder / "sibling",
        version=_OTHER,
        base_model=card.base_model,
        max_user_tokens=card.max_user_tokens,
        max_item_tokens=card.max_item_tokens,
    )
    registry.publish(folder / "sibling", version=_OTHER, parent=first)


async def _measure(
    url: str,
    num_items: int,
    promoter: Executor,
    registry: str,
    kafka: KafkaSettings,
    turns: list[ModelVersion],
    console: Console,
) -> list[Row]:
    answers: list[_Answer] = []
    made: list[_Swap] = []
    done = asyncio.Event()
    replicas = _Replicas()
    async with httpx.AsyncClient(base_url=url, timeout=10.0) as client:
        await wait_until_ready(client, num_items)
        rate = await _bearable_rate(client)
        background = [
            asyncio.create_task(_load(client, rate, answers, done)),
            asyncio.create_task(_watch(client, replicas, done)),
        ]
        await asyncio.sleep(5.0)  # caches fill, and there is something to warm up on
        with Progress(console=console, transient=True) as progress:
            for version in progress.track(turns, description="swaps"):
                told_at, flipped_at = await _swap(replicas, promoter, registry, kafka, version)
                await asyncio.sleep(_AFTER_S + _QUIET_S)
                made.append(_Swap(told_at, flipped_at, time.monotonic()))
        done.set()
        await asyncio.gather(*background)
    return _rows(answers, made, rate)


async def _bearable_rate(client: httpx.AsyncClient) -> int:
    """Returns how many requests per second keep the replicas busy for `_BUSY` of the time."""
    took_s = []
    for number in range(_ALONE):
        began = time.monotonic()
        response = await client.post("/v1/recommendations", json={"user_id": f"load-{number}", "n": 10})
        response.raise_for_status()  # a refusal is soon said, and tells nothing
        took_s.append(time.monotonic() - began)
    return min(max(round(_BUSY / statistics.median(took_s)), 1), _MOST_RATE)


async def _load(client: httpx.AsyncClient, rate: int, answers: list[_Answer], done: asyncio.Event) -> None:
    """Asks on schedule, whether or not earlier requests have returned, so waiting is counted."""

    async def ask(number: int) -> None:
        sent_at = time.monotonic()
        try:
            response = await client.post("/v1/recommendations", json={"user_id": f"load-{number % 200}", "n": 10})
            status, body = response.status_code, response.json() if response.status_code == 200 else {}
        except httpx.HTTPError:
            status, body = 0, {}
        answers.append(_Answer(sent_at, (time.monotonic() - sent_at) * 1000, status, str(body.get("degraded"))))

    begin, number = time.monotonic(), 0
    async with asyncio.TaskGroup() as requests:
        while not done.is_set():
            requests.create_task(ask(number))
            number += 1
            await asyncio.sleep(max(begin + number / rate - time.monotonic(), 0.0))


async def _watch(client: httpx.AsyncClient, replicas: _Replicas, done: asyncio.Event) -> None:
    while not done.is_set():
        found: list[dict[str, str]] = []
        with contextlib.suppress(httpx.HTTPError):  # nobody's request: the next look will tell
            found = (await client.get("/v1/models")).json()["replicas"]
        versions = {replica["serving"] for replica in found}
        if len(found) == REPLICAS and len(versions) == 1 and replicas.serving not in versions:
            replicas.serving = str(versions.pop())
            replicas.changed.set()
        await asyncio.sleep(_LOOK_S)


async def _swap(
    replicas: _Replicas, promoter: Executor, registry: str, kafka: KafkaSettings, version: ModelVersion
) -> tuple[float, float]:
    """Returns when the replicas were told of the version, and when the last served it."""
    told_at = await asyncio.get_running_loop().run_in_executor(promoter, _promote, registry, kafka, version)
    async with asyncio.timeout(60.0):
        while replicas.serving != version:
            replicas.changed.clear()
            await replicas.changed.wait()
    return told_at, time.monotonic()


def _promote(registry: str, kafka: KafkaSettings, version: ModelVersion) -> float:
    """Returns when the announcement began; the clock is the machine's, the same in every process."""
    announcement = Registry(registry).promote(version)
    told_at = time.monotonic()
    announce(kafka, announcement)
    return told_at


def _rows(answers: Sequence[_Answer], made: Sequence[_Swap], rate: int) -> list[Row]:
    inside = [answer for answer in answers if made[0].told_at <= answer.sent_at < made[-1].quiet_until]
    failed = sum(answer.status != 200 for answer in inside)
    degraded = sum(answer.status == 200 and answer.rung != "none" for answer in inside)
    near = [_between(inside, swap.told_at, swap.flipped_at + _AFTER_S) for swap in made]
    quiet = [_between(inside, swap.flipped_at + _AFTER_S, swap.quiet_until) for swap in made]
    p99_near, p99_quiet = (float(np.percentile(np.concatenate(found), 99)) for found in (near, quiet))
    low, high = np.quantile(_drawn_differences(near, quiet), [0.025, 0.975])
    took_s = np.array([swap.flipped_at - swap.told_at for swap in made])
    count = f"{len(made)} swaps of {REPLICAS} replicas at {rate} requests per second"
    of_near, of_quiet = (sum(map(len, found)) for found in (near, quiet))
    return [
        {"name": f"{count}, failed requests of {len(inside)}", "value": float(failed), "unit": ""},
        {"name": f"{count}, answers below the top rung", "value": float(degraded), "unit": ""},
        {
            "name": f"{count}, request p99 from the announcement to {_AFTER_S} s after the swap, of {of_near}",
            "value": p99_near,
            "unit": "ms",
        },
        {"name": f"{count}, request p99 in the quiet between, of {of_quiet}", "value": p99_quiet, "unit": "ms"},
        {"name": f"{count}, added p99", "value": p99_near - p99_quiet, "unit": "ms"},
        {"name": f"{count}, added p99, 95 % interval from", "value": float(low), "unit": "ms"},
        {"name": f"{count}, added p99, 95 % interval to", "value": float(high), "unit": "ms"},
        {"name": f"{count}, until all replicas answer with it, p50", "value": float(np.median(took_s)), "unit": "s"},
        {"name": f"{count}, until all replicas answer with it, longest", "value": float(took_s.max()), "unit": "s"},
    ]


def _between(answers: Sequence[_Answer], begin: float, end: float) -> list[float]:
    return [answer.took_ms for answer in answers if begin <= answer.sent_at < end]


def _drawn_differences(near: Sequence[Sequence[float]], quiet: Sequence[Sequence[float]]) -> list[float]:
    """Returns the difference of the two p99 of as many swaps drawn with replacement, again and again."""
    rng = np.random.default_rng(0)
    found = []
    for _ in range(_RESAMPLES):
        drawn = rng.integers(len(near), size=len(near))
        pooled = [np.concatenate([side[index] for index in drawn]) for side in (near, quiet)]
        found.append(float(np.percentile(pooled[0], 99) - np.percentile(pooled[1], 99)))
    return found
