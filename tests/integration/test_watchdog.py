"""The watchdog on a real broker: it reads what was shown and clicked, hears the replicas, and moves the pointer."""

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from uuid import uuid4

import msgspec
import pytest
from kafka import TopicPartition

from stream.broker import LocalKafka
from tailrace.events import Click, Impression, ModelAnnouncement, Ranked, encode
from tailrace.ids import EventId, ItemId, ModelVersion, RequestId, UserId
from tailrace.kafka_clients import create_topics, open_consumer, open_producer
from tailrace.pointer import assigned_version
from tailrace.registry import Registry, open_registry
from tailrace.settings import Settings, load_settings
from tailrace.topics import tailrace_topics
from tests.e2e.scene import until
from tests.servers import hear_interrupts
from training.judgement import Judgement
from training.watchdog import watch

V1, V2 = ModelVersion("v1"), ModelVersion("v2")
CARD = {
    "base_model": "tiny",
    "split_layer": 3,
    "item_states": 4,
    "feature_names_hash": "abc",
    "text_version": 1,
    "precisions": ["int8"],
}


class Replicas:
    """Answers `/v1/models` as a gateway would, with the counts a test has set."""

    def __init__(self) -> None:
        self.told: dict[str, Any] = {"replica": "one", "refused": {}, "versions": {}}
        self.asked = threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:  # the name http.server asks for
                body = json.dumps({"pointer": None, "replicas": [outer.told]}).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)
                outer.asked.set()

            def log_message(self, *arguments: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def tell(self, version: str, requests: int, *, errors: int = 0) -> None:
        self.told["versions"][version] = {
            "requests": requests,
            "below_top": errors,
            "errors": errors,
            "score_p50_ms": 10.0,
            "score_p99_ms": 20.0,
        }


@pytest.fixture
def replicas() -> Iterator[Replicas]:
    found = Replicas()
    yield found
    found.server.shutdown()
    found.server.server_close()


@pytest.fixture
def settings(kafka: LocalKafka, replicas: Replicas, tmp_path: Path) -> Settings:
    prefix = f"watchdog-{uuid4().hex[:8]}-"
    found = load_settings(
        None,
        {},
        data_dir=str(tmp_path),
        kafka={"bootstrap_servers": kafka.bootstrap_servers, "topic_prefix": prefix, "user_partitions": 2},
        gate={"canary_impressions": 60},
        gateway={"port": replicas.server.server_port},
    )
    create_topics(found.kafka)
    return found


@pytest.fixture
def registry(settings: Settings, tmp_path: Path) -> Registry:
    """With `v1` as the champion, and `v2` published."""
    source = tmp_path / "bundle"
    source.mkdir()
    (source / "model.json").write_bytes(msgspec.json.encode(CARD))
    found = open_registry(settings)
    for version in (V1, V2):
        found.publish(source, version=version)
    found.promote(V1)
    return found


@contextmanager
def watching(settings: Settings, replicas: Replicas) -> Iterator[list[tuple[str, Judgement]]]:
    """Gives what the watchdog decides, which has begun to listen."""
    decided: list[tuple[str, Judgement]] = []
    stop = threading.Event()
    options: dict[str, Any] = {"stop": stop, "interval_s": 0.1}
    options["decided"] = lambda version, judgement: decided.append((version, judgement))
    thread = threading.Thread(target=watch, args=(settings,), kwargs=options)
    thread.start()
    try:
        assert replicas.asked.wait(20)
        yield decided
    finally:
        stop.set()
        thread.join(20)
        assert not thread.is_alive()


def live(settings: Settings, registry: Registry, rates: dict[ModelVersion, float], visits: int = 600) -> None:
    """Shows slates of eight to 100 users who click at the rate of their version."""
    topics, producer = tailrace_topics(settings.kafka), open_producer(settings.kafka, linger_ms=5)
    pointer = registry.pointer()
    assert pointer is not None
    shown: dict[ModelVersion, int] = {V1: 0, V2: 0}
    for number in range(visits):
        user_id, request_id = UserId(f"user-{number % 100}"), RequestId(uuid4().hex)
        version = assigned_version(user_id, pointer)
        items = [ItemId(f"item-{place}") for place in range(8)]
        impression = Impression(
            event_id=EventId(request_id),
            request_id=request_id,
            user_id=user_id,
            occurred_at=int(time.time() * 1000),
            model_version=version,
            feature_names_hash="",
            user_text="",
            shown=[Ranked(item_id=item, text="", features="", score=0.0, source="user") for item in items],
        )
        producer.send(topics["impressions"].name, encode(impression), user_id.encode())
        for item in items:
            shown[version] += 1
            # Evenly: the n-th item shown is clicked whenever n times the rate passes a whole number.
            if int(shown[version] * rates[version]) > int((shown[version] - 1) * rates[version]):
                click = Click(
                    event_id=EventId(uuid4().hex),
                    user_id=user_id,
                    occurred_at=int(time.time() * 1000),
                    item_id=item,
                    request_id=request_id,
                )
                producer.send(topics["clicks"].name, encode(click), user_id.encode())
    producer.flush(timeout=30)
    producer.close()


def announced(settings: Settings) -> list[ModelAnnouncement]:
    place = TopicPartition(tailrace_topics(settings.kafka)["models"].name, 0)
    with closing(open_consumer(settings.kafka)) as consumer:
        consumer.assign([place])
        consumer.seek_to_beginning(place)
        end, found = consumer.end_offsets([place])[place], []
        while consumer.position(place) < end:
            for records in consumer.poll(timeout_ms=200).values():
                found += [msgspec.json.decode(record.value, type=ModelAnnouncement) for record in records]
    return found


def wait_until(good: Callable[[], bool], timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not good():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.02)


def look(replicas: Replicas, times: int) -> None:
    """Returns when the watchdog has looked so many times more."""
    for _ in range(times):
        replicas.asked.clear()
        assert replicas.asked.wait(10)


@pytest.mark.parametrize(("rate", "action", "champion"), [(0.2, "promote", V2), (0.05, "rollback", V1)])
def test_canary_is_promoted_or_rolled_back_by_the_clicks_it_gets(
    settings: Settings, registry: Registry, replicas: Replicas, rate: float, action: str, champion: str
) -> None:
    registry.start_canary(V2, 0.4)
    with watching(settings, replicas) as decided:
        live(settings, registry, {V1: 0.2, V2: rate})
        wait_until(lambda: len(decided) > 0)
        wait_until(lambda: len(announced(settings)) == 1)
    assert [(version, judgement.action) for version, judgement in decided] == [(V2, action)]
    assert "click" in decided[0][1].reason
    pointer = registry.pointer()
    assert pointer is not None
    assert (pointer.champion, pointer.canary, pointer.reason) == (champion, None, action)
    [told] = announced(settings)
    assert (told.version, told.reason, told.canary) == (champion, action, None)


def test_refused_canary_is_rolled_back(settings: Settings, registry: Registry, replicas: Replicas) -> None:
    registry.start_canary(V2, 0.4)
    replicas.told["refused"] = {"v2": "v2 makes item vectors that are not finite"}
    with watching(settings, replicas) as decided:
        wait_until(lambda: len(decided) > 0)
    assert decided[0][1].reason == "refused: v2 makes item vectors that are not finite"
    pointer = registry.pointer()
    assert pointer is not None
    assert (pointer.champion, pointer.canary) == (V1, None)


def test_champion_just_promoted_is_rolled_back_when_it_fails_as_the_one_before_did_not(
    settings: Settings, registry: Registry, replicas: Replicas
) -> None:
    replicas.tell("v1", 1000, errors=2)
    with watching(settings, replicas) as decided:
        replicas.tell("v1", 1500, errors=3)
        registry.promote(V2)
        for requests in range(0, 100_000, 20):  # whenever the watchdog notices, there is more to come
            replicas.tell("v2", requests, errors=requests // 2)
            replicas.asked.clear()
            assert replicas.asked.wait(10)
            if decided:
                break
        replicas.told["versions"]["v1"]["requests"] = 1600
        replicas.asked.clear()
        assert replicas.asked.wait(10)  # it looks on, and leaves the old champion where it is
    assert [(version, judgement.action) for version, judgement in decided] == [(V2, "rollback")]
    pointer = registry.pointer()
    assert pointer is not None
    assert (pointer.champion, pointer.reason) == (V1, "rollback")


def test_champion_promoted_at_once_is_rolled_back_when_it_loses_the_clicks_of_the_one_before(
    settings: Settings, registry: Registry, replicas: Replicas, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("training.live_evidence.SETTLED_S", 0.5)  # the readers here click at once
    monkeypatch.setattr("training.live_evidence._GRACE_S", 0.0)
    with watching(settings, replicas) as decided:
        live(settings, registry, {V1: 0.2})
        look(replicas, times=10)  # by then it has read it all, and it has settled
        registry.promote(V2)
        look(replicas, times=2)  # it has begun to count for the new champion
        live(settings, registry, {V2: 0.05})
        wait_until(lambda: len(decided) > 0)
    assert [(version, judgement.action) for version, judgement in decided] == [(V2, "rollback")]
    assert "of the clicks" in decided[0][1].reason
    pointer = registry.pointer()
    assert pointer is not None
    assert (pointer.champion, pointer.reason) == (V1, "rollback")


def test_gateway_that_does_not_answer_is_waited_for(settings: Settings, registry: Registry, replicas: Replicas) -> None:
    registry.start_canary(V2, 0.4)
    with watching(settings, replicas) as decided:
        good, replicas.told = replicas.told, {"no": "status"}
        replicas.asked.clear()
        assert replicas.asked.wait(10)
        replicas.told = {**good, "refused": {"v2": "damaged"}}
        wait_until(lambda: len(decided) > 0)
    assert decided[0][1].action == "rollback"


def test_canary_begun_by_hand_is_taken_back_by_whoever_watches(
    settings: Settings, registry: Registry, tmp_path: Path
) -> None:
    file = tmp_path / "tailrace.toml"
    file.write_text(
        f'data_dir = "{settings.data_dir}"\n'
        f'[kafka]\nbootstrap_servers = "{settings.kafka.bootstrap_servers}"\n'
        f'topic_prefix = "{settings.kafka.topic_prefix}"\nuser_partitions = 2\n'
        f"[gateway]\nport = {settings.gateway.port}\n[gate]\nmax_canary_s = 0.5\n"
    )
    registry.start_canary(V2, 0.3)
    command = [sys.executable, "-m", "tailrace.cli", "--settings", str(file), "watch"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, preexec_fn=hear_interrupts) as process:
        try:
            until(registry.pointer, lambda pointer: pointer is not None and pointer.canary is None, timeout_s=60)
        finally:
            process.send_signal(signal.SIGINT)
        told, _ = process.communicate(timeout=20)
    assert process.returncode == 0 and told.startswith("v2: rollback; undecided after")
