"""Watches a canary, and a champion just promoted, while they serve: promotes, rolls back, or goes on watching.

What is judged and by which test is in `judgement.py`; here it is fed, and what it says is done. A process that dies
loses its counts and begins to count anew: nothing moves but through the registry, which refuses what others overtook.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from pathlib import Path

import httpx
import msgspec
import structlog
from kafka import TopicPartition
from kafka.errors import KafkaError

from tailrace.errors import BrokerUnavailable, BundleError, InvalidRecord
from tailrace.events import Click, Impression, decode_event
from tailrace.ids import ModelVersion
from tailrace.kafka_clients import open_consumer
from tailrace.pointer import Pointer
from tailrace.registry import Registry, announce, open_registry
from tailrace.settings import GateSettings, KafkaSettings, Settings
from tailrace.topics import tailrace_topics
from training.judgement import NO_EVIDENCE, Evidence, Judgement, judge, judge_fresh, newest_known, on_probation
from training.live_evidence import LiveEvidence, ModelsPage

log = structlog.get_logger()

_INTERVAL_S = 1.0  # between two looks
_HTTP_TIMEOUT_S = 5.0
_ROLES = ("impressions", "clicks")
_MAX_REMEMBERED = 4

_page_decoder = msgspec.json.Decoder(ModelsPage)

# Hears what was decided of which version, whenever it is not to wait.
Decided = Callable[[ModelVersion, Judgement], None]


class Watch:
    """What the watchdog knows: the counts since the pointer last moved, and how champions did before it did."""

    def __init__(self, gate: GateSettings) -> None:
        self.evidence = LiveEvidence()
        self._gate = gate
        self._pointer: Pointer | None = None
        self._before: dict[ModelVersion, Evidence] = {}

    def follow(self, pointer: Pointer) -> None:
        """Begins to count anew when the pointer has moved; how the champion did until then is remembered."""
        last = self._pointer
        if last is not None and last.generation == pointer.generation:
            return
        if last is not None:
            did = self.evidence.settled(last.champion)
            self._before[last.champion] = newest_known(self._before.pop(last.champion, NO_EVIDENCE), did)
            for version in list(self._before)[:-_MAX_REMEMBERED]:
                del self._before[version]
        self.evidence.begin()
        self._pointer = pointer

    def judge(self, now: datetime) -> tuple[ModelVersion, Judgement] | None:
        """Returns the version on trial and what to do with it; None when none is."""
        pointer = self._pointer
        if pointer is None or pointer.pinned:
            return None
        since_s = (now - pointer.updated_at).total_seconds()
        if pointer.canary is not None:
            champion, canary = self.evidence.so_far(pointer.champion), self.evidence.so_far(pointer.canary)
            judgement = judge(champion, canary, self._gate)
            if judgement.action == "wait" and since_s > self._gate.max_canary_s:
                judgement = Judgement("rollback", f"undecided after {since_s:.0f} s: {judgement.reason}")
            return pointer.canary, judgement
        fresh = self.evidence.settled(pointer.champion)
        if pointer.reason == "promote" and pointer.history and on_probation(fresh, since_s, self._gate):
            before = self._before.get(pointer.history[-1], NO_EVIDENCE)
            return pointer.champion, judge_fresh(before, fresh, self._gate)
        return None


class _Feed:
    """Impressions and clicks from now on."""

    def __init__(self, kafka: KafkaSettings) -> None:
        topics = tailrace_topics(kafka)
        self._roles = {topics[role].name: role for role in _ROLES}
        self._consumer = open_consumer(kafka, fetch_max_wait_ms=100)
        partitions = [
            TopicPartition(topics[role].name, index) for role in _ROLES for index in range(topics[role].partitions)
        ]
        self._consumer.assign(partitions)
        self._consumer.seek_to_end()
        for partition in partitions:  # the seek is lazy, and "now" is now
            self._consumer.position(partition)

    def read(self, evidence: LiveEvidence, for_s: float) -> None:
        """Adds what comes within `for_s` seconds. Erasures and what cannot be decoded are passed over."""
        until = time.monotonic() + for_s
        while (left_s := until - time.monotonic()) > 0:
            for partition, records in self._consumer.poll(timeout_ms=max(int(left_s * 1000), 1)).items():
                for record in records:
                    if record.value is not None:
                        self._add(evidence, self._roles[partition.topic], record.value)

    def close(self) -> None:
        self._consumer.close()

    def _add(self, evidence: LiveEvidence, role: str, value: bytes) -> None:
        try:
            event = decode_event(role, value)
        except InvalidRecord:  # the stream workers make a dead letter of it
            return
        if isinstance(event, Impression):
            evidence.add_impression(event)
        elif isinstance(event, Click):
            evidence.add_click(event)


def watch(
    settings: Settings,
    *,
    stop: threading.Event,
    decided: Decided = lambda version, judgement: None,
    interval_s: float = _INTERVAL_S,
) -> None:
    """Watches until `stop` is set; a look takes `interval_s`. Feedback counts from now on.

    Whatever does not answer is waited for: Kafka, the gateway, the registry.
    """
    watched, registry = Watch(settings.gate), open_registry(settings)
    url = f"http://{settings.gateway.host}:{settings.gateway.port}"
    with httpx.Client(base_url=url, timeout=_HTTP_TIMEOUT_S) as client:
        while not stop.is_set():
            try:
                with closing(_Feed(settings.kafka)) as feed:
                    watched.evidence.break_off()  # a feed begins now, wherever the last one ended
                    while not stop.is_set():
                        _look(watched, feed, client, registry, settings, decided, interval_s, stop)
            except (KafkaError, BrokerUnavailable) as error:
                log.warning("the watchdog lost the broker", error=str(error))
                stop.wait(interval_s)


@contextmanager
def watchdog_beside(settings: Settings) -> Iterator[None]:
    """Watches on a thread of its own while the block lasts."""
    stop = threading.Event()
    thread = threading.Thread(target=watch, args=(settings,), kwargs={"stop": stop}, name="watchdog")
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def if_sound(registry: Registry, version: ModelVersion, judgement: Judgement, cache_dir: Path) -> Judgement:
    """Returns the judgement, or one to roll back where a version to promote has a file unlike what was published.

    Replicas that share a file with another version have it in memory, and would not notice; one that starts later
    could not open the version.
    """
    if judgement.action != "promote":
        return judgement
    try:
        registry.fetch(version, cache_dir)
    except BundleError as error:
        return Judgement("rollback", f"refused: {error}")
    return judgement


def _look(
    watched: Watch,
    feed: _Feed,
    client: httpx.Client,
    registry: Registry,
    settings: Settings,
    decided: Decided,
    interval_s: float,
    stop: threading.Event,
) -> None:
    try:
        # 1. Where the pointer is.
        pointer = registry.pointer()
        if pointer is not None:
            watched.follow(pointer)
        # 2. What is shown and clicked, and how the replicas have fared.
        feed.read(watched.evidence, interval_s)
        page = client.get("/v1/models").raise_for_status()
        watched.evidence.add_statuses(_page_decoder.decode(page.content).replicas)
        # 3. Judge.
        found = watched.judge(datetime.now(UTC))
        if pointer is None or found is None or found[1].action == "wait":
            return
        # 4. Act, unless another has moved the pointer since.
        version, judgement = found[0], if_sound(registry, *found, settings.path("cache") / "bundles")
        log.warning("the watchdog moves the pointer", version=version, action=judgement.action, reason=judgement.reason)
        if judgement.action == "promote":
            announcement = registry.promote(version, generation=pointer.generation)
        else:
            announcement = registry.rollback(generation=pointer.generation)
        decided(version, judgement)
    except (BundleError, OSError, httpx.HTTPError, msgspec.MsgspecError) as error:
        log.warning("the watchdog could not look or act; looking again", error=str(error))
        stop.wait(interval_s)
        return
    # 5. Tell the replicas. They find out by themselves where Kafka does not take it, only later.
    announce(settings.kafka, announcement)
