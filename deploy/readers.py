"""Simulated readers as real clients: they ask over HTTP, act over HTTP and Kafka, and are counted by arm.

Each reader belongs to one arm for good: `personalised` slates come from Tailrace, `popular` and `random` ones are made
here, so that the three see the same world at the same time. The world decides what is clicked.
"""

import asyncio
import time
import uuid
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

import httpx
import numpy as np

from deploy.history import DAYS
from tailrace.events import Action, Click, Context, Rating, encode
from tailrace.ids import EventId, ItemId, RequestId, UserId
from tailrace.world import Moment, Reaction, Reader, World

ARMS = ("personalised", "popular", "random")
SLATE_SIZE = 8
_ARM_SHARES = (0.7, 0.15, 0.15)
_PROBED_ITEM = ItemId("probe")  # no such book: a probe's click must not make anything popular
_WINDOW = 2000
_FIRST_HOUR = 24 * DAYS + 12  # of the world: noon after the readers' past
_WORLD_SECONDS_PER_SECOND = 60.0  # a minute of the demo is an hour of the readers' lives

STRETCH_S = 30  # what readers made of it is told by stretches of so many seconds

# Puts one event on its topic: (topic role, key, value).
SendEvent = Callable[[str, str, bytes], None]


@dataclass
class Worth:
    """What some slates came to, and what the world says they were worth: `expected` clicks are free of luck.

    `attainable` are those of the best slates that the very same readers could have been shown then.
    """

    shown: int = 0
    clicked: int = 0
    expected: float = 0.0
    attainable: float = 0.0

    @property
    def click_rate(self) -> float:
        """Clicks per item shown; 0 before anything was shown."""
        return self.clicked / max(self.shown, 1)

    @property
    def expected_rate(self) -> float:
        """Expected clicks per item shown; 0 before anything was shown."""
        return self.expected / max(self.shown, 1)

    @property
    def attained(self) -> float:
        """The part of the attainable clicks that is expected, 0 to 1: the same scale for any readers and any hour."""
        return self.expected / self.attainable if self.attainable else 0.0


@dataclass
class Tally:
    """What the readers saw, so far. Versions stand in the order they came, stretches are of personalised slates."""

    started: float = field(default_factory=time.monotonic)
    by_arm: defaultdict[str, Worth] = field(default_factory=lambda: defaultdict(Worth))
    by_version: defaultdict[str, Worth] = field(default_factory=lambda: defaultdict(Worth))
    by_stretch: defaultdict[int, Worth] = field(default_factory=lambda: defaultdict(Worth))
    events: int = 0
    answers: int = 0
    failed: int = 0
    degraded: Counter[str] = field(default_factory=Counter)
    request_ms: deque[float] = field(default_factory=lambda: deque(maxlen=_WINDOW))
    visible_ms: deque[float] = field(default_factory=lambda: deque(maxlen=_WINDOW))
    last_answer: dict[str, Any] = field(default_factory=dict)

    def where(self, arm: str, version: str | None) -> list[Worth]:
        """Returns all that a slate shown now counts in; `version` made it, where Tailrace did."""
        if version is None:
            return [self.by_arm[arm]]
        stretch = int((time.monotonic() - self.started) // STRETCH_S)
        return [self.by_arm[arm], self.by_version[version], self.by_stretch[stretch]]


def arm_of(user_id: UserId) -> str:
    """Returns the arm a reader belongs to: a hash of the id, so a restart changes nothing."""
    place = int.from_bytes(blake2b(user_id.encode(), digest_size=4).digest()) / 2**32
    bounds = np.cumsum(_ARM_SHARES)
    return ARMS[int(np.searchsorted(bounds[:-1], place, side="right"))]


class Readers:
    """A population that visits at a steady rate. `rng` decides who comes when; the world decides what they do."""

    def __init__(
        self,
        world: World,
        client: httpx.AsyncClient,
        send: SendEvent,
        *,
        count: int,
        seed: int,
        past: Sequence[Click] = (),
    ) -> None:
        self.world = world
        self.tally = Tally()
        self._client = client
        self._send = send
        self._seed = seed
        self._readers = [world.reader(number, seed=seed) for number in range(count)]
        self._known: set[UserId] = set()
        self._clicks: Counter[ItemId] = Counter()
        self._rng = np.random.default_rng(seed)
        by_id = {reader.user_id: reader for reader in self._readers}
        for click in past:  # what was popular before is so in every arm, and nobody reads a book twice
            self._clicks[click.item_id] += 1
            by_id[click.user_id].read.add(click.item_id)

    def attainable_click_rate(self) -> float:
        """Returns the best expected clicks per item shown, averaged over the readers as they begin."""
        moment = Moment(hours=_FIRST_HOUR, device="desktop")
        best = [
            self.world.expected_clicks(reader, self.world.best_slate(reader, SLATE_SIZE, moment), moment) / SLATE_SIZE
            for reader in self._readers
        ]
        return float(np.mean(best))

    async def live(self, duration_s: float, *, visits_per_s: float) -> None:
        """Returns after `duration_s` seconds of visits, when the last reader has left."""
        async with asyncio.TaskGroup() as visits:
            deadline = time.monotonic() + duration_s
            while time.monotonic() < deadline:
                reader = self._readers[int(self._rng.integers(len(self._readers)))]
                visits.create_task(self._visit(reader, np.random.default_rng(self._rng.integers(2**63))))
                await asyncio.sleep(float(self._rng.exponential(1.0 / visits_per_s)))

    async def _visit(self, reader: Reader, rng: np.random.Generator) -> None:
        # 1. The reader arrives, on some device; a context event says so.
        await self._remember(reader)
        world_s = _FIRST_HOUR * 3600 + (time.monotonic() - self.tally.started) * _WORLD_SECONDS_PER_SECOND
        moment = self.world.moment(world_s, rng)
        self._emit("contexts", Context(device=moment.device, country="GB", **_stamp(reader.user_id)))
        # 2. A slate is shown.
        arm = arm_of(reader.user_id)
        slate, request_id, version = await self._slate(arm, reader, rng)
        if not slate:
            return
        counted_in = self.tally.where(arm, version)
        expected = self.world.expected_clicks(reader, slate, moment)
        best = self.world.expected_clicks(reader, self.world.best_slate(reader, len(slate), moment), moment)
        for worth in counted_in:
            worth.shown += len(slate)
            worth.expected += expected
            worth.attainable += best
        # 3. The reader reacts; half of the readers' apps speak HTTP, the other half Kafka.
        over_http = bool(rng.random() < 0.5)
        elapsed = 0.0
        for reaction in self.world.react(reader, slate, moment, rng):
            # What is put aside for long is opened at the end of the visit: nobody looks on for an hour.
            await asyncio.sleep(min(reaction.delay_s - elapsed, 2.0) if reaction.delay_s > elapsed else 0.0)
            elapsed = reaction.delay_s
            for worth in counted_in:
                worth.clicked += reaction.action == "click"
            self._clicks[reaction.item_id] += reaction.action == "click"
            await self._act(reader.user_id, reaction, request_id, over_http=over_http)

    async def _remember(self, reader: Reader) -> None:
        """A demo started again goes on: what the reader has read is in the profile that Tailrace kept."""
        if reader.user_id in self._known:
            return
        self._known.add(reader.user_id)
        answer = await self._get(f"/v1/users/{reader.user_id}/profile")
        if answer is not None:
            touched = {touch["item_id"] for touch in answer.get("recent", []) if touch["action"] == "click"}
            reader.read |= touched & set(self.world.item_ids)

    async def _slate(
        self, arm: str, reader: Reader, rng: np.random.Generator
    ) -> tuple[list[ItemId], RequestId | None, str | None]:
        """Returns the slate, and where Tailrace made it the request and the version of the model."""
        unread = [item_id for item_id in self.world.item_ids if item_id not in reader.read]
        if arm == "random":
            return [unread[row] for row in rng.permutation(len(unread))[:SLATE_SIZE]], None, None
        if arm == "popular":
            return sorted(unread, key=lambda item_id: -self._clicks[item_id])[:SLATE_SIZE], None, None
        started = time.monotonic()
        answer = await self._post("/v1/recommendations", {"user_id": reader.user_id, "n": SLATE_SIZE, "explain": True})
        if answer is None:
            return [], None, None
        self.tally.request_ms.append((time.monotonic() - started) * 1000)
        self.tally.answers += 1
        self.tally.degraded[answer["degraded"]] += 1
        self.tally.last_answer = answer
        slate = [ItemId(row["item_id"]) for row in answer["items"]]
        return slate, RequestId(answer["request_id"]), answer["model_version"]

    async def _act(self, user_id: UserId, reaction: Reaction, request_id: RequestId | None, *, over_http: bool) -> None:
        about: dict[str, Any] = {"item_id": reaction.item_id, "request_id": request_id, "position": reaction.position}
        action: Action = reaction.action
        acted: list[tuple[str, Click | Rating]] = [
            ("clicks", Click(action=action, dwell_s=reaction.dwell_s, **about, **_stamp(user_id)))
        ]
        if reaction.rating is not None:
            acted.append(("ratings", Rating(value=float(reaction.rating), **about, **_stamp(user_id))))
        if not over_http:
            for stream, event in acted:
                self._emit(stream, event)
            return
        self.tally.events += len(acted)
        body = b"[" + b",".join(_typed(stream, event) for stream, event in acted) + b"]"
        await self._post("/v1/events", body)

    def _emit(self, stream: str, event: Click | Rating | Context) -> None:
        self.tally.events += 1
        self._send(stream, event.user_id, encode(event))

    async def probe(self, stop: asyncio.Event, *, every_s: float = 0.5) -> None:
        """Measures, until `stop`, how long a click takes to be visible: from the POST until the profile has it."""
        number = 0
        run = uuid.uuid4().hex[:8]
        while not stop.is_set():
            number += 1
            user_id = UserId(f"probe-{run}-{number % 20}")
            click = Click(item_id=_PROBED_ITEM, **_stamp(user_id))
            before = ((await self._get(f"/v1/users/{user_id}/profile")) or {"events": 0})["events"]
            started = time.monotonic()
            if await self._post("/v1/events", b"[" + _typed("clicks", click) + b"]") is not None:
                self.tally.events += 1
                while time.monotonic() - started < 5.0:
                    profile = await self._get(f"/v1/users/{user_id}/profile")
                    if profile is not None and profile["events"] > before:
                        self.tally.visible_ms.append((time.monotonic() - started) * 1000)
                        break
                    await asyncio.sleep(0.002)
            await asyncio.sleep(every_s)

    async def _get(self, path: str) -> dict[str, Any] | None:
        return self._answer(await self._try(self._client.get(path)), missing_is_fine=True)

    async def _post(self, path: str, body: dict[str, Any] | bytes) -> dict[str, Any] | None:
        if isinstance(body, bytes):
            call = self._client.post(path, content=body, headers={"content-type": "application/json"})
        else:
            call = self._client.post(path, json=body)
        return self._answer(await self._try(call))

    async def _try(self, call: Any) -> httpx.Response | None:
        try:
            response: httpx.Response = await call
        except httpx.TransportError:
            return None
        return response

    def _answer(self, response: httpx.Response | None, *, missing_is_fine: bool = False) -> dict[str, Any] | None:
        if response is not None and response.status_code < 300:
            found: Any = response.json()
            return found if isinstance(found, dict) else {"verdicts": found}
        if not (missing_is_fine and response is not None and response.status_code == 404):
            self.tally.failed += 1
        return None


def _stamp(user_id: UserId) -> dict[str, Any]:
    return {"event_id": EventId(uuid.uuid4().hex), "user_id": user_id, "occurred_at": int(time.time() * 1000)}


def _typed(stream: str, event: Click | Rating) -> bytes:
    return b'{"type":"' + stream.removesuffix("s").encode() + b'",' + encode(event)[1:]
