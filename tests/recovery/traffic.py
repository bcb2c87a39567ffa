"""A reproducible stream of records with everything in it that real producers send: retries, late events, nonsense."""

import json
import random
import threading
import time
from collections.abc import Iterator
from typing import Any

from tailrace.events import ACTIONS
from tailrace.kafka_clients import open_producer
from tailrace.settings import Settings
from tailrace.topics import USER_STREAMS, tailrace_topics

ITEMS = 40
_BASE_MS, _STEP_MS = 1_700_000_000_000, 700

Message = tuple[str, bytes, bytes | None, int | None]  # role of the topic, key, value, record time where it matters


def announce_items(settings: Settings) -> None:
    """Writes the catalogue, and returns when Kafka has it."""
    topic = tailrace_topics(settings.kafka)["items"].name
    producer = open_producer(settings.kafka)
    for index in range(ITEMS):
        item = {
            "item_id": f"i{index}",
            "title": f"Item {index}",
            "tags": [f"tag{index % 7}", f"tag{index % 11}"],
            "facts": [{"relation": "author", "entity": f"author{index % 5}"}],
        }
        producer.send(topic, key=f"i{index}".encode(), value=json.dumps(item).encode())
    producer.flush()
    producer.close()


def messages(seed: int) -> Iterator[Message]:
    """Yields records without end. About one in ten is a retry, an erasure, or of no use."""
    rng = random.Random(seed)
    recent: list[Message] = []
    number = 0
    while True:
        number += 1
        message = _message(rng, seed, number)
        draw = rng.random()
        if draw < 0.04 and recent:
            yield rng.choice(recent)  # a producer's retry: same bytes, same event id
        elif draw < 0.08:
            yield _unusable(rng, message)
        elif draw < 0.085:
            # Forget a user up to now, in event time: the same in every stream, so their order makes no difference.
            user = f"u{rng.randrange(40, 50)}".encode()
            for role in USER_STREAMS:
                yield role, user, None, _BASE_MS + number * _STEP_MS
        else:
            recent = [*recent[-15:], message]
            yield message


def _message(rng: random.Random, seed: int, number: int) -> Message:
    late_ms = rng.choice([0, 0, 0, 0, 5_000, 3_600_000])
    event: dict[str, Any] = {"event_id": f"e{seed}-{number}", "occurred_at": _BASE_MS + number * _STEP_MS - late_ms}
    item_id = f"i{int(ITEMS * 1.1 * rng.random() ** 2)}"
    user_id = f"u{int(50 * rng.random() ** 2)}"
    draw = rng.random()
    event["user_id"] = user_id
    if draw < 0.6:
        role = "clicks"
        event |= {"item_id": item_id, "action": rng.choice(ACTIONS), "dwell_s": round(rng.random() * 90, 2)}
    elif draw < 0.75:
        role = "ratings"
        event |= {"item_id": item_id, "value": rng.randint(1, 5)}
        if rng.random() < 0.3:
            event["review"] = f"Words about {item_id}."
    elif draw < 0.85:
        role = "contexts"
        event |= {"device": rng.choice(["phone", "desk"]), "attributes": {"n": number % 3}}
    else:
        role = "impressions"
        shown = [{"item_id": f"i{rng.randrange(ITEMS)}", "text": "", "features": "", "score": 0.5, "source": "t"}]
        event |= {
            "request_id": event["event_id"],
            "model_version": "v0",
            "feature_names_hash": "h",
            "user_text": "",
            "shown": shown * rng.randint(1, 3),
        }
    return role, user_id.encode(), json.dumps(event).encode(), None


def _unusable(rng: random.Random, message: Message) -> Message:
    role, key, value, _ = message
    assert value is not None
    event = json.loads(value)
    match rng.randrange(5):
        case 0:
            return role, key, value[: len(value) // 2], None
        case 1:
            return role, key, b"\x00\xff" * 10_000, None
        case 2:
            return role, key, json.dumps(event | {"occurred_at": "2200-01-01T00:00:00Z"}).encode(), None
        case 3:
            return role, key, json.dumps(event | {"user_id": "somebody-else"}).encode(), None
        case _:
            del event["event_id"]
            return role, key, json.dumps(event).encode(), None


class Traffic:
    """A producer in a thread of its own, that goes on whatever dies around it."""

    def __init__(self, settings: Settings, seed: int, per_s: float) -> None:
        self.sent = 0
        self._settings = settings
        self._messages = messages(seed)
        self._per_s = per_s
        self._stop = threading.Event()
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="traffic", daemon=True)

    def start(self) -> "Traffic":
        self._thread.start()
        return self

    def stop(self) -> None:
        """Returns when the broker has acknowledged every record. Raises what the producer raised."""
        self._stop.set()
        self._thread.join(timeout=60)
        assert not self._thread.is_alive(), "the producer did not finish"
        if self._failure is not None:
            raise self._failure

    def _run(self) -> None:
        try:
            producer = open_producer(self._settings.kafka, linger_ms=5)
            began = time.monotonic()
            unacknowledged: list[Any] = []
            while not self._stop.wait(0.02):
                for _ in range(int((time.monotonic() - began) * self._per_s) - self.sent):
                    unacknowledged.append(_send(producer, self._settings, next(self._messages)))
                    self.sent += 1
            producer.flush(timeout=50)
            for future in unacknowledged:
                future.get(timeout=0)
            producer.close()
        except BaseException as error:
            self._failure = error


def produce(settings: Settings, seed: int, count: int) -> None:
    """Writes the first `count` records of a seed, and returns when Kafka has them."""
    producer = open_producer(settings.kafka, linger_ms=5)
    source = messages(seed)
    sent = [_send(producer, settings, next(source)) for _ in range(count)]
    producer.flush()
    for future in sent:
        future.get(timeout=10)
    producer.close()


def _send(producer: Any, settings: Settings, message: Message) -> Any:
    role, key, value, at_ms = message
    return producer.send(tailrace_topics(settings.kafka)[role].name, key=key, value=value, timestamp_ms=at_ms)
