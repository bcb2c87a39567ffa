"""`make demo`: the whole system on this machine, a bundled catalogue of books, and simulated readers who use it.

What it writes stays in `.tailrace/`; started again, it goes on from there.
"""

import asyncio
import contextlib
import importlib.resources
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import httpx
from msgspec.structs import replace
from rich.console import Console
from rich.live import Live
from rich.progress import Progress

from deploy.history import DAYS, live_past
from deploy.live_view import facts, live_panel, print_summary
from deploy.local import local_system
from deploy.readers import Readers, expected_click_rates
from deploy.training_job import count_impressions
from services.loaded_model import LoadedModel
from tailrace.errors import NotReady, TailraceError
from tailrace.events import encode
from tailrace.items import Item, decode_item
from tailrace.kafka_clients import open_admin, open_producer, stream_lag
from tailrace.registry import open_registry
from tailrace.settings import Settings, load_settings
from tailrace.telemetry import configure_logging
from tailrace.topics import tailrace_topics
from tailrace.world import Moment, World
from training.schedule import Schedule

_READERS = 40
_PAST_VISITS = 2200  # before the demo began: enough for a first round to find what version 0 does not know
_VISITS_PER_S = 6.0
# A few minutes of a few dozen readers: rounds begin early, learn little at a time, and the gate asks for less certainty
# than it should where anybody's shop is at stake.
_SETTINGS: dict[str, Any] = {
    "training": {"min_examples": 150, "wait_s": 5.0, "holdout_share": 0.2, "threads": 1},
    "gate": {"margin": 0.05, "max_found_loss": 0.05, "confidence": 0.8, "canary_share": 0.5, "canary_impressions": 60},
}
_ROUND_AFTER = 400  # new impressions
_READY_TIMEOUT_S = 120.0


@click.command()
@click.option("--duration", "duration_s", type=click.FloatRange(min=1), default=240.0, help="seconds of live readers")
@click.option("--past", type=click.IntRange(min=DAYS), default=_PAST_VISITS, help="visits before the demo, once")
@click.option("--seed", type=int, default=0, help="which world")
@click.option("--settings", "settings_file", type=click.Path(path_type=Path, exists=True), default=None)
def main(duration_s: float, past: int, seed: int, settings_file: Path | None) -> None:
    """Runs the demo and prints what happened."""
    started = time.monotonic()
    console = Console()

    def tell(line: str) -> None:
        console.print(f"[dim]{time.monotonic() - started:6.1f} s[/]  {line}")

    try:
        settings = load_settings(settings_file, **_SETTINGS)
        logs = settings.path("logs")
        logs.mkdir(parents=True, exist_ok=True)
        with (logs / "demo.log").open("a") as log_file:
            configure_logging(settings, log_file)
            with local_system(settings, tell, Schedule(after_examples=_ROUND_AFTER)) as running:
                asyncio.run(_run_readers(running, duration_s, past, seed, console, tell))
                tell("Stopping")
    except TailraceError as error:
        raise click.ClickException(str(error)) from error
    tell("Stopped; run it again and it goes on from here")


async def _run_readers(
    settings: Settings, duration_s: float, past: int, seed: int, console: Console, tell: Callable[[str], None]
) -> None:
    # 1. The catalogue: announced as any producer would announce it. The same records again change nothing.
    producer = open_producer(settings.kafka, linger_ms=5)
    topics = tailrace_topics(settings.kafka)
    items = announce_books(producer, settings)
    tell(f"{len(items)} books are on the `items` topic")

    # 2. A past, once: what readers were shown and did before, from which the first round learns.
    if not count_impressions(settings):
        _import_past(settings, items, producer, past, seed, console)
        tell(f"{past:,} visits of the last days are in the log: what was shown, and what became of it")

    url = f"http://{settings.gateway.host}:{settings.gateway.port}"
    async with httpx.AsyncClient(base_url=url, timeout=10.0) as client:
        # 3. The first recommendation.
        await wait_until_ready(client, len(items))
        await _first_recommendation(client, tell)
        # 4. Readers come and go; a probe measures; a person watches.
        world = World(items, seed=seed)
        readers = Readers(
            world,
            client,
            lambda role, key, value: producer.send(topics[role].name, key=key.encode(), value=value),
            count=_READERS,
            seed=seed,
        )
        moment = Moment(hours=12.0, device="desktop")
        ceiling = expected_click_rates(world, [world.reader(number, seed=seed) for number in range(100)], moment)
        stop = asyncio.Event()
        admin = open_admin(settings.kafka)

        def lag() -> int:
            return sum(stream_lag(admin, settings.kafka, settings.stream.group).values())

        watching = asyncio.create_task(_watch(readers, lag, ceiling, duration_s, console, stop))
        probing = asyncio.create_task(readers.probe(stop))
        await readers.live(duration_s, visits_per_s=_VISITS_PER_S)
        stop.set()
        await asyncio.gather(watching, probing)
        producer.flush(timeout=30)
        print_summary(console, readers.tally, await asyncio.to_thread(lag), ceiling)
        admin.close()
    producer.close()


def load_books() -> list[Item]:
    """Returns the bundled catalogue: classic books, written for this project."""
    lines = importlib.resources.files("tailrace.data").joinpath("books.jsonl").read_bytes().splitlines()
    return [decode_item(line) for line in lines]


def announce_books(producer: Any, settings: Settings) -> list[Item]:
    """Puts the bundled catalogue on the `items` topic, waits until the broker has it, and returns it."""
    items = load_books()
    topic = tailrace_topics(settings.kafka)["items"].name
    for item in items:
        producer.send(topic, key=item.item_id.encode(), value=encode(item))
    producer.flush(timeout=30)
    return items


def _import_past(
    settings: Settings, items: list[Item], producer: Any, visits: int, seed: int, console: Console
) -> None:
    """Puts the readers' past on the topics, as version 0 without its text half would have recommended to them."""
    settings = replace(settings, ranker=replace(settings.ranker, item_text_cache=False))
    registry, topics = open_registry(settings), tailrace_topics(settings.kafka)
    [version] = registry.versions()
    model = LoadedModel.load(registry.fetch(version, settings.path("cache")), version, settings)
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("visits of the last days", total=visits)
        events = live_past(
            items,
            settings,
            model,
            readers=_READERS,
            visits_a_day=visits // DAYS,
            until_ms=int(time.time() * 1000),
            seed=seed,
            progress=lambda done, total: progress.update(task, completed=done, total=total),
        )
    for stream, event in events:
        producer.send(topics[stream].name, key=event.user_id.encode(), value=encode(event))
    producer.flush(timeout=30)


async def wait_until_ready(client: httpx.AsyncClient, num_items: int) -> None:
    """Returns when `/readyz` says yes and every ranker knows `num_items` items. Raises NotReady after two minutes."""
    deadline = time.monotonic() + _READY_TIMEOUT_S
    answer = "nothing yet"
    while time.monotonic() < deadline:
        with contextlib.suppress(httpx.TransportError):
            response = await client.get("/readyz")
            answer = response.text
            if response.status_code == 200:
                replicas = (await client.get("/v1/models")).json()["replicas"]
                if replicas and all(replica["items"] >= num_items for replica in replicas):
                    return
                answer = f"{[replica['items'] for replica in replicas]} of {num_items} items are encoded"
        await asyncio.sleep(0.2)
    raise NotReady(f"the services were not ready within {_READY_TIMEOUT_S:g} s: {answer}")


async def _first_recommendation(client: httpx.AsyncClient, tell: Callable[[str], None]) -> None:
    body = {"user_id": "first-visitor", "n": 3, "query": "a ghost in an old castle", "explain": True, "dry_run": True}
    response = await client.post("/v1/recommendations", json=body)
    response.raise_for_status()
    answer = response.json()
    tell(f'First recommendation, for a stranger who asks for "{body["query"]}":')
    for row in answer["items"]:
        tell(f"   {row['title']}  ({'; '.join(row['reasons'])})")


async def _watch(
    readers: Readers,
    lag_now: Callable[[], int],
    ceiling: float,
    duration_s: float,
    console: Console,
    stop: asyncio.Event,
) -> None:
    if not console.is_terminal:
        while not await _stopped(stop, 10.0):
            lag = await asyncio.to_thread(lag_now)
            console.print(" | ".join(f"{name}: {figure}" for name, figure in facts(readers.tally, lag, ceiling)))
        return
    with Live(console=console, refresh_per_second=2, transient=True) as live:
        while not await _stopped(stop, 1.0):
            lag = await asyncio.to_thread(lag_now)
            remaining_s = duration_s - (time.monotonic() - readers.tally.started)
            live.update(live_panel(readers.tally, lag, ceiling, remaining_s))


async def _stopped(stop: asyncio.Event, within_s: float) -> bool:
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(stop.wait(), within_s)
    return stop.is_set()


if __name__ == "__main__":
    main()
