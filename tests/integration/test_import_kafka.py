"""Importing and replaying into a real Kafka, by the same commands a person types."""

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from kafka import TopicPartition

from stream.broker import LocalKafka
from tailrace.cli import main
from tailrace.events import decode_event
from tailrace.features import FEATURE_NAMES_HASH
from tailrace.ids import ModelVersion, UserId
from tailrace.items import decode_item
from tailrace.kafka_clients import create_topics, open_consumer, partition_of
from tailrace.registry import Registry
from tailrace.settings import KafkaSettings, load_settings
from tailrace.stores import open_store
from tailrace.stores.store import Batch, Offset
from tailrace.text import TEXT_VERSION
from tailrace.topics import tailrace_topics
from tests.servers import hear_interrupts

PARTITIONS = 3
ACTIONS = ["view", "click", "like"]


@dataclass
class Place:
    """Topics of this test alone, and how a command is told of them."""

    kafka: KafkaSettings
    env: dict[str, str]

    def run(self, *arguments: object) -> Result:
        return CliRunner().invoke(main, list(map(str, arguments)), env=self.env)

    def report(self, *arguments: object) -> dict[str, Any]:
        result = self.run(*arguments, "--json")
        assert result.exit_code == 0, result.output
        found: dict[str, Any] = json.loads(result.stdout)
        return found

    def records(self, role: str) -> list[Any]:
        """Returns every record of a topic, partition by partition."""
        topic = tailrace_topics(self.kafka)[role]
        consumer = open_consumer(self.kafka)
        found: list[Any] = []
        try:
            partitions = [TopicPartition(topic.name, index) for index in range(topic.partitions)]
            consumer.assign(partitions)
            consumer.seek_to_beginning(*partitions)
            ends = consumer.end_offsets(partitions)
            while any(consumer.position(partition) < end for partition, end in ends.items()):
                for records in consumer.poll(timeout_ms=200).values():
                    found += records
        finally:
            consumer.close()
        return found


@pytest.fixture
def place(kafka: LocalKafka, tmp_path: Path) -> Place:
    prefix = f"import-{uuid.uuid4().hex[:8]}-"
    settings = KafkaSettings(bootstrap_servers=kafka.bootstrap_servers, topic_prefix=prefix, user_partitions=PARTITIONS)
    env = {
        "TAILRACE_DATA_DIR": str(tmp_path / "data"),
        "TAILRACE_KAFKA__BOOTSTRAP_SERVERS": kafka.bootstrap_servers,
        "TAILRACE_KAFKA__TOPIC_PREFIX": prefix,
        "TAILRACE_KAFKA__USER_PARTITIONS": str(PARTITIONS),
    }
    return Place(settings, env)


@pytest.fixture
def films(tmp_path: Path) -> Path:
    """A MovieLens folder from long ago: 40 users, 300 ratings, 12 films."""
    folder = tmp_path / "films"
    folder.mkdir()
    rows = [f"u{n % 40},{n % 12},{n % 10 / 2 + 0.5},{1_000_000_000 + n * 7 % 300}" for n in range(300)]
    (folder / "ratings.csv").write_text("userId,movieId,rating,timestamp\n" + "\n".join(rows) + "\n")
    films = [f"{n},Film {n} (1999),Drama" for n in range(12)]
    (folder / "movies.csv").write_text("movieId,title,genres\n" + "\n".join(films) + "\n")
    return folder


def make_clicks(path: Path, count: int, gap_ms: int = 1000) -> Path:
    rows = (
        json.dumps({"user_id": f"u{n % 7}", "item_id": f"i{n}", "action": ACTIONS[n % 3], "occurred_at": n * gap_ms})
        for n in range(count)
    )
    path.write_text("\n".join(rows) + "\n")
    return path


def test_import_sends_everything_once_to_the_partition_of_its_user(place: Place, films: Path) -> None:
    started_ms = time.time_ns() // 1_000_000
    report = place.report("import", "movielens", films)
    assert (report["items"], report["events"], report["acknowledged"], report["present"]) == (12, 300, 312, 0)

    ratings = place.records("ratings")
    assert len(ratings) == 300
    events = [decode_event("ratings", record.value) for record in ratings]
    assert len({event.event_id for event in events}) == 300
    for record, event in zip(ratings, events, strict=True):
        assert record.key.decode() == event.user_id
        assert record.partition == partition_of(event.user_id, PARTITIONS)
    for index in range(PARTITIONS):
        times = [event.at_ms for record, event in zip(ratings, events, strict=True) if record.partition == index]
        assert times == sorted(times)
    # The event keeps its own time; the record is stamped when it is sent, or retention would delete it at once.
    assert max(event.at_ms for event in events) < 1_000_000_300_000
    assert all(record.timestamp >= started_ms for record in ratings)
    assert {decode_item(record.value).title for record in place.records("items")} == {f"Film {n}" for n in range(12)}


def test_second_import_sends_no_event_again_and_items_keep_their_one_value(place: Place, films: Path) -> None:
    place.report("import", "movielens", films)
    again = place.report("import", "movielens", films)
    assert (again["items"], again["events"], again["present"]) == (12, 0, 300)
    assert len(place.records("ratings")) == 300
    assert Counter(record.key for record in place.records("items")) == {str(n).encode(): 2 for n in range(12)}
    values = {record.key: set[bytes]() for record in place.records("items")}
    for record in place.records("items"):
        values[record.key].add(record.value)
    assert all(len(versions) == 1 for versions in values.values())

    resent = place.report("import", "movielens", films, "--resend")
    assert resent["events"] == 300


def test_import_that_was_cut_short_goes_on_where_it_stopped(place: Place, tmp_path: Path) -> None:
    clicks = make_clicks(tmp_path / "clicks.jsonl", 500)
    first = place.report("import", "jsonl", clicks, "--limit", 200)
    rest = place.report("import", "jsonl", clicks)
    assert (first["events"], rest["events"], rest["present"]) == (200, 300, 200)
    assert len(place.records("clicks")) == 500


def test_bad_row_sends_nothing_and_skip_bad_sends_the_rest(place: Place, tmp_path: Path) -> None:
    clicks = make_clicks(tmp_path / "clicks.jsonl", 50)
    clicks.write_text(clicks.read_text() + '{"user_id": "u"}\n')
    stopped = place.run("import", "jsonl", clicks)
    assert stopped.exit_code == 1
    assert "clicks.jsonl:51" in stopped.stderr
    create_topics(place.kafka)
    assert place.records("clicks") == []

    report = place.report("import", "jsonl", clicks, "--skip-bad")
    assert (report["events"], report["bad"]) == (50, 1)
    assert report["bad_rows"][0].startswith("clicks.jsonl:51: ")


def test_replay_keeps_the_gaps_divided_by_the_speed(place: Place, tmp_path: Path) -> None:
    clicks = make_clicks(tmp_path / "clicks.jsonl", 21, gap_ms=60_000)  # twenty minutes
    report = place.report("replay", "jsonl", clicks, "--speed", 600)  # in two seconds
    assert report["acknowledged"] == 21
    assert 2.0 <= report["seconds"] < 10.0
    records = sorted(place.records("clicks"), key=lambda record: json.loads(record.value)["occurred_at"])
    gaps_ms = [after.timestamp - before.timestamp for before, after in pairwise(records)]
    assert 1800 <= sum(gaps_ms) < 10_000
    assert min(gaps_ms) > 0


def test_replay_at_full_speed_sends_items_when_they_became_available(place: Place, films: Path) -> None:
    report = place.report("replay", "movielens", films, "--speed", "max")
    assert (report["items"], report["events"], report["behind_s"]) == (12, 300, 0.0)


def test_ctrl_c_in_a_replay_keeps_what_was_acknowledged_and_says_how_much(place: Place, tmp_path: Path) -> None:
    clicks = make_clicks(tmp_path / "clicks.jsonl", 1000)
    command = [sys.executable, "-m", "tailrace.cli", "replay", "jsonl", str(clicks), "--speed", "20"]
    with subprocess.Popen(
        command,
        env=os.environ | place.env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=hear_interrupts,
    ) as process:
        create_topics(place.kafka)
        deadline = time.monotonic() + 30
        while len(place.records("clicks")) < 5:
            assert time.monotonic() < deadline
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    sent = len(place.records("clicks"))
    assert f"{sent:,} events sent, {sent:,} acknowledged" in out


def test_topics_are_created_once_and_another_partition_count_is_refused(place: Place, films: Path) -> None:
    first = json.loads(place.run("topics", "--json").stdout)
    assert json.loads(place.run("topics", "--json").stdout) == first
    assert first["clicks"]["partitions"] == PARTITIONS

    place.env["TAILRACE_KAFKA__USER_PARTITIONS"] = "5"
    for command in (["topics"], ["import", "movielens", films]):
        refused = place.run(*command)
        assert refused.exit_code == 1
        assert f"{place.kafka.topic_prefix}clicks has 3 partitions but the settings say 5" in refused.stderr
        assert "Traceback" not in refused.output


def test_status_counts_lag_against_the_stored_offsets(place: Place, tmp_path: Path) -> None:
    missing = place.run("status")
    assert missing.exit_code == 1
    assert "run `tailrace topics` first" in missing.stderr

    place.report("import", "jsonl", make_clicks(tmp_path / "clicks.jsonl", 100))
    found = json.loads(place.run("status", "--json").stdout)
    assert (found["lag"], found["profiles"], found["pointer"]) == (100, 0, None)

    ends = {one["partition"]: one["streams"][0]["end"] for one in found["partitions"]}
    assert sum(ends.values()) == 100
    store = open_store(load_settings(environ=place.env))
    partition = max(ends, key=lambda index: ends[index])
    token = store.claim(partition)
    offsets = {"clicks": Offset("any", ends[partition])}
    store.save(partition, token, Batch(profiles={UserId("u1"): b"x"}, offsets=offsets))
    store.close()
    found = json.loads(place.run("status", "--json").stdout)
    assert (found["lag"], found["profiles"]) == (100 - ends[partition], 1)
    assert "lag" in place.run("status").stdout


def test_promotion_and_rollback_are_announced(place: Place, tmp_path: Path) -> None:
    source = tmp_path / "bundle"
    source.mkdir()
    card = {
        "base_model": "tiny",
        "split_layer": 3,
        "item_states": 4,
        "feature_names_hash": FEATURE_NAMES_HASH,
        "text_version": TEXT_VERSION,
        "precisions": ["int8"],
    }
    (source / "model.json").write_text(json.dumps(card))
    registry = Registry(str(tmp_path / "data" / "registry"))
    for version in ("v1", "v2"):
        registry.publish(source, version=ModelVersion(version))
    create_topics(place.kafka)
    for command in (["promote", "v1"], ["promote", "v2"], ["rollback"]):
        assert place.run("models", *command).exit_code == 0
    said = [json.loads(record.value) for record in place.records("models")]
    assert [(one["version"], one["previous"], one["reason"]) for one in said] == [
        ("v1", None, "promote"),
        ("v2", "v1", "promote"),
        ("v1", "v2", "rollback"),
    ]
    assert {record.key for record in place.records("models")} == {b"pointer"}
