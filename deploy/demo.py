"""`make demo`: the whole system on this machine, a bundled catalogue of books, and simulated readers who use it.

What it writes stays in `.tailrace/`; started again, it goes on from there.
"""

import asyncio
import contextlib
import importlib.resources
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
import httpx
from kafka.errors import KafkaError
from msgspec.structs import replace
from rich.console import Console
from rich.live import Live
from rich.progress import Progress

from deploy.history import DAYS, live_past
from deploy.live_view import facts, live_panel, print_summary
from deploy.local import local_system, rounds_beside
from deploy.readers import Readers
from services.loaded_model import LoadedModel
from tailrace.errors import BrokerUnavailable, NotReady, TailraceError
from tailrace.events import Click, UserEvent, encode
from tailrace.items import Item, decode_item
from tailrace.kafka_clients import open_admin, open_producer, stream_lag
from tailrace.registry import open_registry
from tailrace.settings import Settings, load_settings
from tailrace.telemetry import configure_logging
from tailrace.topics import tailrace_topics
from tailrace.world import World
from training.schedule import Schedule

_READERS = 40
_PAST_VISITS = 4400  # before the demo began: with half as many a first round gains nothing that a reader would notice
_VISITS_PER_S = 3.0
# A few minutes of a few dozen readers: rounds begin early, learn little at a time, and the gate asks for less certainty
# than it should where anybody's shop is at stake.
_SETTINGS: dict[str, Any] = {
    "training": {"min_examples": 150, "wait_s": 5.0, "max_holdout": 250, "epochs": 2},
    "gate": {
        "margin": 0.05,
        "better_confidence": 0.0,
        "confidence": 0.8,
        "canary_share": 0.5,
        "canary_impressions": 40,
    },
}
_ROUND_AFTER = 400  # new impressions
_READY_TIMEOUT_S = 120.0


@click.command()
@click.option("--duration", "duration_s", type=click.FloatRange(min=1), default=240.0, help="seconds of live readers")
@click.option(
    "--past", "past_visits", type=click.IntRange(min=DAYS), default=_PAST_VISITS, help="visits before the demo, once"
)
@click.option("--seed", type=int, default=0, help="which world")
@click.option("--settings", "settings_file", type=click.Path(path_type=Path, exists=True), default=None)
def main(duration_s: float, past_visits: int, seed: int, settings_file: Path | None) -> None:
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
            with local_system(settings, tell) as running:
                past = _prepare(running, past_visits, seed, console, tell)
                with rounds_beside(running, Schedule(after_examples=_ROUND_AFTER), tell):
                    asyncio.run(_run_readers(running, past, duration_s, seed, console, tell))
                tell("Stopping")
    except TailraceError as error:
        raise click.ClickException(str(error)) from error
    tell("Stopped; run it again and it goes on from here")


def _prepare(settings: Settings, visits: int, seed: int, console: Console, tell: Callable[[str], None]) -> list[Click]:
    """Announces the catalogue and, once, puts the readers' past into the log. Returns what they clicked in it."""
    # 1. The catalogue: announced as any producer would announce it. The same records again change nothing.
    producer = open_producer(settings.kafka, linger_ms=5)
    items = announce_books(producer, settings)
    tell(f"{len(items)} books are on the `items` topic")
    # 2. The past, as version 0 would have recommended: not where it is there, or something else serves already.
    registry, told = open_registry(settings), settings.path("past-imported")
    pointer = registry.pointer()
    assert pointer is not None
    past: list[Click] = []
    if not told.exists() and registry.manifest(pointer.champion).parent is None:
        folder = registry.fetch(pointer.champion, settings.path("cache") / "bundles")
        quiet = replace(settings, ranker=replace(settings.ranker, item_text_cache=False))  # replicas fill the cache
        model = LoadedModel.load(folder, pointer.champion, quiet)
        events = _live_past(items, settings, model, visits, seed, console)
        _send_all(producer, settings, events)
        told.touch()
        past = [event for _, event in events if isinstance(event, Click) and event.action == "click"]
        shown = sum(stream == "impressions" for stream, _ in events)
        tell(f"{shown:,} visits of the last days are in the log: what was shown, and what became of it")
    producer.close()
    return past


def _live_past(
    items: list[Item], settings: Settings, model: LoadedModel, visits: int, seed: int, console: Console
) -> list[tuple[str, UserEvent]]:
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("visits of the last days", total=visits)
        return live_past(
            items,
            settings,
            model,
            readers=_READERS,
            visits_a_day=visits // DAYS,
            until_ms=int(time.time() * 1000),
            seed=seed,
            progress=lambda done, total: progress.update(task, completed=done, total=total),
        )


def _send_all(producer: Any, settings: Settings, events: Sequence[tuple[str, UserEvent]]) -> None:
    """Returns once Kafka has all of them. Raises BrokerUnavailable."""
    topics = tailrace_topics(settings.kafka)
    try:
        sent = [
            producer.send(topics[stream].name, key=event.user_id.encode(), value=encode(event))
            for stream, event in events
        ]
        producer.flush(timeout=30)
        for future in sent:
            future.get(timeout=0)
    except KafkaError as error:
        raise BrokerUnavailable(f"the past could not be sent: {error}") from error


async def _run_readers(
    settings: Settings,
    past: Sequence[Click],
    duration_s: float,
    seed: int,
    console: Console,
    tell: Callable[[str], None],
) -> None:
    producer = open_producer(settings.kafka, linger_ms=5)
    topics, items = tailrace_topics(settings.kafka), load_books()
    url = f"http://{settings.gateway.host}:{settings.gateway.port}"
    async with httpx.AsyncClient(base_url=url, timeout=10.0) as client:
        # 1. The first recommendation.
        await wait_until_ready(client, len(items))
        await _first_recommendation(client, tell)
        # 2. Readers come and go; a probe measures; a person watches.
        readers = Readers(
            World(items, seed=seed),
            client,
            lambda role, key, value: producer.send(topics[role].name, key=key.encode(), value=value),
            count=_READERS,
            seed=seed,
            past=past,
        )
        ceiling = readers.attainable_click_rate()
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
