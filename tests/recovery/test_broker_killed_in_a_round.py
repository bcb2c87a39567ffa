"""The broker killed under a training round: it fails or waits, nothing is half-published, and the next one succeeds."""

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from deploy.training_parts import round_parts
from stream.broker import LocalKafka
from tailrace.errors import BrokerUnavailable
from tailrace.events import Click, Impression, Ranked, encode
from tailrace.features import FEATURE_NAMES_HASH, encode_features
from tailrace.ids import EventId
from tailrace.kafka_clients import create_topics, open_producer
from tailrace.registry import open_registry
from tailrace.rounds import RoundRecord, open_round_log
from tailrace.settings import KafkaSettings, Settings
from tailrace.topics import tailrace_topics
from tests.recovery.round_process import FIRST, MadeUpLog, make_settings, publish_first
from training.examples import Example
from training.round import run_round


class House:
    """A broker of its own that can die and come back, a log of impressions and clicks on it, and version 0 serving."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "kafka"
        self._kafka = LocalKafka.start(self._folder)
        made = make_settings(folder)
        kafka = KafkaSettings(bootstrap_servers=self._kafka.bootstrap_servers, user_partitions=2)
        training = msgspec.structs.replace(made.training, wait_s=0.0)
        self.settings: Settings = msgspec.structs.replace(made, kafka=kafka, training=training)
        self.registry = open_registry(self.settings)
        publish_first(self.registry, folder / "v0")
        create_topics(kafka)
        self._produce(MadeUpLog().examples)

    def kill(self) -> None:
        """Ends the broker without a farewell."""
        self._kafka.kill()

    def revive(self) -> None:
        """Brings it back with its records, at the same address."""
        self._kafka = LocalKafka.start(self._folder)

    def round(
        self,
        on_step: Callable[[str], None] = lambda step: None,
        progress: Callable[[str, int, int], None] = lambda step, done, total: None,
    ) -> RoundRecord:
        """Runs a round in this process, as the training job would."""
        return run_round(replace(round_parts(self.settings, progress), on_step=on_step))

    def close(self) -> None:
        """Ends the broker."""
        self._kafka.kill()

    def _produce(self, examples: list[Example]) -> None:
        topics, producer = tailrace_topics(self.settings.kafka), open_producer(self.settings.kafka, linger_ms=5)
        shown_ms = time.time_ns() // 1_000_000 - 60_000
        for example in examples:
            ranked = [
                Ranked(item_id=item_id, text=text, features=encode_features(features_F), score=0.0, source="user")
                for item_id, text, features_F in zip(example.item_ids, example.texts, example.features_NF, strict=True)
            ]
            impression = Impression(
                event_id=EventId(example.request_id),
                request_id=example.request_id,
                user_id=example.user_id,
                occurred_at=shown_ms,
                model_version=FIRST,
                feature_names_hash=FEATURE_NAMES_HASH,
                user_text=example.user_text,
                shown=ranked[: example.num_shown],
                unshown=ranked[example.num_shown :],
            )
            producer.send(topics["impressions"].name, encode(impression), example.user_id.encode())
            for item_id, clicked in zip(example.item_ids, example.clicked_N.tolist(), strict=True):
                if clicked:
                    click = Click(
                        event_id=EventId(f"{example.request_id}-{item_id}"),
                        user_id=example.user_id,
                        occurred_at=shown_ms + 1000,
                        item_id=item_id,
                        request_id=example.request_id,
                    )
                    producer.send(topics["clicks"].name, encode(click), example.user_id.encode())
        producer.flush(timeout=30)
        producer.close()


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    made = House(tmp_path)
    yield made
    made.close()


def test_broker_killed_in_a_round_leaves_what_serves_and_the_next_round_succeeds(house: House) -> None:
    # 1. It dies when the log is to be read, and stays away: the round fails, and says why.
    pointer = house.registry.pointer()
    with pytest.raises(BrokerUnavailable):
        house.round(on_step=lambda step: house.kill() if step == "read" else None)
    [failed] = open_round_log(house.settings).newest()
    assert failed.outcome == "failed" and "Kafka" in failed.reason
    assert house.registry.versions() == [FIRST] and house.registry.pointer() == pointer

    # 2. It dies in the middle of reading, and comes back: the round waits, and reads all there is.
    house.revive()
    back = threading.Thread(target=house.revive)

    def kill_in_the_middle(step: str, done: int, total: int) -> None:
        if step.startswith("impressions") and not back.ident:
            house.kill()
            back.start()

    waited = house.round(progress=kill_in_the_middle)
    back.join()
    assert waited.outcome == "promoted" and waited.fresh == len(MadeUpLog().examples)
    moved = house.registry.pointer()
    assert moved is not None and moved.champion == waited.version

    # 3. It is dead when replicas are to be told: the version serves all the same, and the record says so.
    house.registry.rollback()
    told_nobody = house.round(on_step=lambda step: house.kill() if step == "promote" else None)
    assert told_nobody.outcome == "promoted"
    moved = house.registry.pointer()
    assert moved is not None and moved.champion == told_nobody.version
    for version in house.registry.versions():  # whole, every one of them
        house.registry.fetch(version, house.settings.path("cache"))
