"""Gateway and worker killed at random while producers replay over HTTP: nothing lost, nothing counted twice."""

import random
import statistics
import threading
import time
from collections import defaultdict
from collections.abc import Callable

import httpx
import pytest

from tailrace.events import decode_event
from tailrace.fold import STREAMS
from tailrace.profile import decode_profile
from tailrace.stores import open_store
from tests.e2e.scene import Scene, kill_replicas, until
from tests.recovery.oracle import assert_state_equals_log, read_topic
from tests.recovery.test_random_kills import SEED

_BATCH = 5
_USERS = 20
_KILLS = 6


class PatientProducer(threading.Thread):
    """Posts events of its own until told to stop, each batch again and again until it is acknowledged."""

    def __init__(self, url: str, seed: int) -> None:
        super().__init__(name=f"producer-{seed}", daemon=True)
        self.acknowledged: list[str] = []
        self.tries = 0
        self.unexpected: list[str] = []
        self._rng = random.Random(seed)
        self._seed = seed
        self._url = url
        self._done = threading.Event()

    def run(self) -> None:
        with httpx.Client(base_url=self._url, timeout=5.0) as client:
            while not self._done.is_set():
                batch = [self._event(len(self.acknowledged) + number) for number in range(_BATCH)]
                while not self._post(client, batch):
                    time.sleep(0.05)
                self.acknowledged += [str(event["event_id"]) for event in batch]

    def finish(self) -> None:
        self._done.set()
        self.join(60)
        assert not self.is_alive(), "the producer did not get through"

    def _post(self, client: httpx.Client, batch: list[dict[str, object]]) -> bool:
        self.tries += 1
        try:
            response = client.post("/v1/events", json=batch)
        except httpx.TransportError:  # the gateway died with the request in hand: nobody knows what became of it
            return False
        if response.status_code == 200:
            assert response.json()["accepted"] == _BATCH, response.text
            return True
        if response.status_code not in (429, 500, 503):
            self.unexpected.append(response.text)
        return False

    def _event(self, number: int) -> dict[str, object]:
        return {
            "type": "click",
            "event_id": f"replay-{self._seed}-{number}",
            "user_id": f"replayed-{self._seed}-{self._rng.randrange(_USERS)}",
            "item_id": f"book-{self._rng.randrange(50)}",
            "occurred_at": 1_750_000_000_000 + number * 1000,
        }


@pytest.mark.timeout(300)
def test_gateway_and_worker_killed_during_a_replay_lose_and_double_nothing(scene: Scene) -> None:
    rng = random.Random(SEED)
    producers = [PatientProducer(str(scene.client.base_url), seed) for seed in (SEED, SEED + 1)]
    for producer in producers:
        producer.start()
    kill: dict[str, Callable[[], None]] = {"gateway": lambda: kill_replicas("gateway"), "worker": scene.worker.kill}
    victims = [*kill] * (_KILLS // len(kill))
    rng.shuffle(victims)
    recovery_s: dict[str, list[float]] = defaultdict(list)
    for victim in victims:
        time.sleep(rng.uniform(0.1, 0.6))
        before = [len(producer.acknowledged) for producer in producers]
        kill[victim]()
        killed_at = time.monotonic()
        until(
            lambda: [len(producer.acknowledged) for producer in producers],
            lambda now: all(count > old for count, old in zip(now, before, strict=True)),  # noqa: B023 - used at once
            timeout_s=60,
        )
        recovery_s[victim].append(time.monotonic() - killed_at)
    for producer in producers:
        producer.finish()

    acknowledged = {event_id for producer in producers for event_id in producer.acknowledged}
    clicks = [record.value for records in read_topic(scene.settings, "clicks").values() for record in records]
    logged = {decode_event("clicks", value).event_id for value in clicks if value is not None}
    logged = {event_id for event_id in logged if event_id.startswith("replay-")}
    assert acknowledged == logged and not [text for producer in producers for text in producer.unexpected]

    store = open_store(scene.settings)
    try:
        ends = {
            partition: sum(len(found[partition]) for found in (read_topic(scene.settings, role) for role in STREAMS))
            for partition in range(scene.settings.kafka.user_partitions)
        }
        until(
            lambda: {
                partition: sum(offset.next_offset for offset in store.load_offsets(partition).values())
                for partition in ends
            },
            lambda stored: stored == ends,
            timeout_s=30,
        )
        folded = assert_state_equals_log(scene.settings, store)
        counted = sum(
            decode_profile(data).events
            for partition in ends
            for user_id, data in store.load_profiles(partition, store.load_users(partition)).items()
            if user_id.startswith("replayed-")
        )
    finally:
        store.close()
    assert counted == len(acknowledged)
    for victim, seconds in recovery_s.items():
        print(f"{victim}: {len(seconds)} kills, the next batch taken after {statistics.median(seconds):.2f} s (median)")
    print(f"{len(acknowledged)} events acknowledged, {folded.repeated} retries in the log; 0 lost, 0 doubled")
