"""A running service as its clients see it: an HTTP address and a broker. Polls with deadlines, never sleeps blindly."""

import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from uuid import uuid4

import httpx
import ray
from ray.util import list_named_actors

from stream.bound_process import start_bound
from tailrace.events import encode
from tailrace.ids import ItemId
from tailrace.items import Fact, Item
from tailrace.kafka_clients import open_producer
from tailrace.registry import Registry
from tailrace.settings import Settings
from tailrace.topics import tailrace_topics

Value = TypeVar("Value")

_SUBJECTS = ("ghosts", "ships", "gardens", "machines", "letters", "mountains", "trains", "islands", "music", "storms")


def book(number: int) -> Item:
    """Returns a made-up book; its subject follows from its number."""
    subject, other = _SUBJECTS[number % 10], _SUBJECTS[(number // 10) % 10]
    return Item(
        item_id=ItemId(f"book-{number}"),
        title=f"The Book of {subject.title()} and {other.title()}, part {number}",
        tags=[subject, other],
        facts=[Fact("author", f"Author {number % 17}")],
        description=f"A long tale about {subject}, told beside {other}.",
        attributes={"pages": float(100 + number)},
    )


class StreamWorker:
    """The process that folds events, which a test may kill. It reads `tailrace.toml` in its folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._process = self._start()

    def kill(self) -> None:
        """Ends it at once, without a farewell, and starts another."""
        self._process.kill()
        self._process.wait(10)
        self._process = self._start()

    def stop(self) -> None:
        """Asks it to stop and waits."""
        self._process.terminate()
        self._process.wait(10)

    def _start(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "stream.worker", "--settings", "tailrace.toml", "--partitions", "0,1"]
        return start_bound(command, self._folder / "worker.log", folder=self._folder)


@dataclass(frozen=True)
class Scene:
    """What a test of the whole service works with."""

    settings: Settings
    client: httpx.Client
    registry: Registry
    bundle: Path
    worker: StreamWorker

    def recommend(self, user_id: str, **fields: Any) -> dict[str, Any]:
        """Returns an answer, which must be a good one."""
        response = self.client.post("/v1/recommendations", json={"user_id": user_id, **fields})
        assert response.status_code == 200, response.text
        answer: dict[str, Any] = response.json()
        return answer

    def statuses(self) -> list[dict[str, Any]]:
        """Returns what each ranker replica has loaded."""
        found: list[dict[str, Any]] = self.client.get("/v1/models").json()["replicas"]
        return found

    def everywhere(self, name: str) -> Any:
        """Returns what every replica says under a name of its status, or None where they differ or one is missing."""
        found = [status[name] for status in self.statuses()]
        agreed = len(found) == self.settings.ranker.min_replicas and all(one == found[0] for one in found)
        return found[0] if agreed else None

    def produce_items(self, items: Sequence[Item]) -> None:
        """Returns once the broker has the items."""
        producer = open_producer(self.settings.kafka)
        name = tailrace_topics(self.settings.kafka)["items"].name
        for sent in [producer.send(name, encode(item), item.item_id.encode()) for item in items]:
            sent.get(timeout=10)
        producer.close()


def kill_replicas(deployment: str) -> None:
    """Ends the processes of a deployment's replicas at once, without a farewell.

    Waits for one to be there first: the last killed may not have been replaced yet.
    """

    def replicas() -> list[dict[str, str]]:
        return [one for one in list_named_actors(all_namespaces=True) if f"#{deployment}#" in one["name"]]

    for one in until(replicas, bool, timeout_s=30):
        ray.kill(ray.get_actor(one["name"], namespace=one["namespace"]))


def new_user() -> str:
    """Returns a user no other test has."""
    return f"user-{uuid4().hex}"


def until(look: Callable[[], Value], good: Callable[[Value], bool], timeout_s: float = 10.0) -> Value:
    """Returns what `look` saw once it is good. Fails with the last thing seen."""
    deadline = time.monotonic() + timeout_s
    while True:
        seen = look()
        if good(seen):
            return seen
        assert time.monotonic() < deadline, f"still not good after {timeout_s:g} s: {seen}"
        time.sleep(0.02)
