"""How long feedback takes to rank: from 10,000 impressions in Kafka to a judged version in every replica.

A simulated town is recommended to by the functions that serve, and reads; what Kafka would hold of it goes to the Kafka
of a running system, whose workers fold it. Then the clock starts, with a round as the Ray job it always is, beside the
services; it ends when every replica has the version it made, as a canary by default. Twice on the same log: with the
head alone learning, as in the demo, and under the default settings. The gate judges as always, but its margin is wide:
whether a figure comes of a run is not left to a handful of slates.
"""

import asyncio
import tempfile
import time
from pathlib import Path

import httpx
from msgspec.structs import replace
from rich.console import Console
from rich.progress import Progress

from deploy.demo import announce_books, load_books, wait_until_ready
from deploy.local import local_system
from deploy.simulated_days import Habits, Log, Town
from deploy.training_job import train_once
from services.loaded_model import LoadedModel
from tailrace.events import encode
from tailrace.ids import ModelVersion
from tailrace.kafka_clients import open_admin, open_producer, stream_lag
from tailrace.registry import announce, open_registry
from tailrace.settings import Settings, load_settings
from tailrace.topics import tailrace_topics
from tests.bench.report import Row
from tests.servers import free_port

_DAYS = 5
_HABITS = Habits(visits_a_day=2000, control_every=0)
_CANDIDATES = 40  # the town is only to be lived through; 200 would take minutes more and log the same 18 a slate
_PATIENCE_S = 600.0


def bench_freshness(console: Console) -> list[Row]:
    """Returns the seconds of each phase, from the start of the round to the last replica, and their sum."""
    with tempfile.TemporaryDirectory(prefix="tailrace-bench-") as folder:
        settings = load_settings(
            None,
            data_dir=folder,
            gateway={"port": free_port()},
            stream={"metrics_port": free_port()},
            gate={"margin": 1.0, "better_confidence": 0.0},
        )
        with local_system(settings, lambda line: console.print(f"[dim]{line}[/]")) as running:
            producer = open_producer(running.kafka)
            num_items = len(announce_books(producer, running))
            url = f"http://{running.gateway.host}:{running.gateway.port}"
            asyncio.run(_wait_until_ready(url, num_items))
            log = _live(running, console)
            topics = tailrace_topics(running.kafka)
            for role, event in log.in_time_order():
                producer.send(topics[role].name, key=event.user_id.encode(), value=encode(event))
            producer.flush()
            producer.close()
            _wait_until_folded(running)
            rows: list[Row] = []
            for what, layers in (("the head alone", 0), ("three layers", 3)):
                training = replace(running.training, trainable_layers=layers)
                rows += _measure(replace(running, training=training), url, what, len(log.impressions), console)
            return rows


async def _wait_until_ready(url: str, num_items: int) -> None:
    async with httpx.AsyncClient(base_url=url, timeout=10.0) as client:
        await wait_until_ready(client, num_items)


def _live(settings: Settings, console: Console) -> Log:
    """Returns what the town's readers were shown and did, under the very version that serves."""
    quick = replace(settings, ranker=replace(settings.ranker, num_candidates=_CANDIDATES))
    registry = open_registry(settings)
    [first] = registry.versions()
    model = LoadedModel.load(registry.fetch(first, Path(settings.data_dir) / "fetched"), first, quick)
    town = Town(load_books(), _HABITS, quick, seed=0)
    with Progress(console=console, transient=True) as progress:
        days = progress.add_task("simulated days", total=_DAYS * _HABITS.visits_a_day)
        for day in range(_DAYS):
            town.live(day, model, model, lambda done, total: progress.advance(days))
    return town.log


def _wait_until_folded(settings: Settings) -> None:
    admin = open_admin(settings.kafka)
    try:
        deadline = time.monotonic() + _PATIENCE_S
        while sum(stream_lag(admin, settings.kafka, settings.stream.group).values()):
            assert time.monotonic() < deadline, "the stream workers did not come to the end of the log"
            time.sleep(0.5)
    finally:
        admin.close()


def _measure(settings: Settings, url: str, what: str, impressions: int, console: Console) -> list[Row]:
    started = time.monotonic()
    with console.status("a round"):
        record = train_once(settings)
    recorded = time.monotonic()
    assert record.outcome in ("canary", "promoted"), f"the round ended otherwise: {record.outcome}, {record.reason}"
    _wait_until_served(url, record.version)
    ended = time.monotonic()
    took_s = {"to start the job, and to report": recorded - started - sum(record.took_s.values())} | record.took_s
    took_s |= {"after its announcement, until every replica has it": ended - recorded}
    if record.outcome == "canary":  # out of the way of the next round
        announce(settings.kafka, open_registry(settings).rollback())
    name = f"freshness, {what} learning: {impressions:,} impressions in Kafka to a judged version in every replica"
    rows: list[Row] = [{"name": name, "value": ended - started, "unit": "s"}]
    phases = ((f"freshness, {what} learning: {phase}", took) for phase, took in took_s.items())
    return [*rows, *({"name": phase, "value": took, "unit": "s"} for phase, took in phases)]


def _wait_until_served(url: str, version: ModelVersion) -> None:
    deadline = time.monotonic() + _PATIENCE_S
    with httpx.Client(base_url=url, timeout=10.0) as client:
        while True:
            replicas = client.get("/v1/models").json()["replicas"]
            if replicas and all(version in (replica["serving"], replica["canary"]) for replica in replicas):
                return
            assert time.monotonic() < deadline, f"{version} does not serve: {replicas}"
            time.sleep(0.02)
