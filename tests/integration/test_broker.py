"""Apache Kafka as Tailrace brings it up: real processes, real jars, loopback only."""

import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from uuid import uuid4

import pytest
from kafka import TopicPartition
from kafka.admin import NewTopic

from stream.broker import LocalKafka
from stream.kafka_jars import LOCK, ensure_kafka, kafka_class_path, read_lock, user_cache
from tailrace.errors import BrokerUnavailable
from tailrace.kafka_clients import open_admin, open_consumer, open_producer
from tailrace.settings import KafkaSettings
from tests.servers import free_port

LISTENING = "0A"  # as /proc/net/tcp writes it
LOOPBACK = {"0100007F", "0000000000000000FFFF00000100007F"}  # 127.0.0.1 in /proc/net/tcp and tcp6


def test_kafka_listens_on_loopback_only(kafka: LocalKafka) -> None:
    if not Path("/proc/net/tcp").exists():
        pytest.skip("reads Linux's table of sockets")
    inodes = set()
    for handle in Path(f"/proc/{kafka.pid}/fd").iterdir():
        if found := re.fullmatch(r"socket:\[(\d+)\]", str(handle.readlink())):
            inodes.add(found[1])
    rows = [line.split() for table in ("tcp", "tcp6") for line in Path("/proc/net", table).read_text().splitlines()[1:]]
    listening = [row[1].split(":")[0] for row in rows if row[3] == LISTENING and row[9] in inodes]

    assert len(listening) == 2  # the broker and the controller
    assert set(listening) <= LOOPBACK


def test_what_is_produced_is_consumed(kafka: LocalKafka) -> None:
    values = [f"{uuid4()}".encode() for _ in range(100)]
    topic = _create_topic(kafka)

    _produce(kafka, topic, values)

    assert _consume(kafka, topic, len(values)) == values


def test_second_broker_on_the_same_data_is_refused_and_the_first_is_found(kafka: LocalKafka, tmp_path: Path) -> None:
    with pytest.raises(
        BrokerUnavailable, match=rf"already runs .* at {kafka.bootstrap_servers} \(process {kafka.pid}\)"
    ):
        LocalKafka.start(kafka.data_dir)

    assert LocalKafka.find(kafka.data_dir) == kafka.bootstrap_servers
    assert LocalKafka.find(tmp_path) is None


def test_killed_broker_goes_on_with_its_records_port_and_cluster(tmp_path: Path) -> None:
    folder = tmp_path / "naïve folder, with a comma"
    values = [f"{uuid4()}".encode() for _ in range(100)]
    first = LocalKafka.start(folder)
    topic, cluster = _create_topic(first), _cluster_id(first)
    _produce(first, topic, values)

    first.kill()
    assert LocalKafka.find(folder) is None

    with LocalKafka.start(folder) as second:
        assert second.bootstrap_servers == first.bootstrap_servers
        assert _cluster_id(second) == cluster
        assert _consume(second, topic, len(values)) == values


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a child that its parent is gone")
def test_broker_ends_with_the_process_that_started_it(tmp_path: Path) -> None:
    script = (
        "import sys, threading, time, pathlib, stream.broker as b\n"
        "def start(): print(b.LocalKafka.start(pathlib.Path(sys.argv[1])).bootstrap_servers, flush=True)\n"
        "thread = threading.Thread(target=start); thread.start(); thread.join()\n"
        "time.sleep(600)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script, tmp_path], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        servers = parent.stdout.readline().strip()
        assert LocalKafka.find(tmp_path) == servers  # it outlives the thread that asked for it

        parent.kill()
        _until(lambda: LocalKafka.find(tmp_path) is None)


def test_kafka_that_ends_at_start_is_quoted(tmp_path: Path) -> None:
    with pytest.raises(BrokerUnavailable, match=r"(?s)ended with status 1.*Too small maximum heap"):
        LocalKafka.start(tmp_path, heap_mb=1)


def test_taken_port_is_refused_by_number(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", free_port())) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(BrokerUnavailable, match=f"port {port} .* is taken"):
            LocalKafka.start(tmp_path, port=port)


def test_jar_that_differs_from_the_lock_is_named_and_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KAFKA_HOME", raising=False)
    folder = _linked_jars(tmp_path / "kafka_2.13-4.3.1")
    damaged = folder / "kafka-clients-4.3.1.jar"
    damaged.unlink()
    damaged.write_bytes(b"not what was locked")

    with pytest.raises(BrokerUnavailable, match=r"kafka-clients-4\.3\.1\.jar does not have the checksum"):
        LocalKafka.start(tmp_path / "data", cache_dir=tmp_path)

    damaged.unlink()
    with pytest.raises(BrokerUnavailable, match=r"kafka-clients-4\.3\.1\.jar is missing"):
        LocalKafka.start(tmp_path / "data", cache_dir=tmp_path)


def test_unreachable_repository_says_what_to_do_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("HTTPS_PROXY", "https_proxy"):
        monkeypatch.setenv(variable, f"http://127.0.0.1:{free_port()}")  # nobody listens there
    for variable in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(variable, "")
    monkeypatch.delenv("KAFKA_HOME", raising=False)
    monkeypatch.setenv("M2_REPO", str(tmp_path / "no-local-repository"))

    with pytest.raises(BrokerUnavailable) as refused:
        LocalKafka.start(tmp_path / "data", cache_dir=tmp_path / "cache")

    for remedy in ("bootstrap_servers", "KAFKA_HOME", "org.apache.kafka:kafka_2.13:4.3.1"):
        assert remedy in str(refused.value)
    assert list((tmp_path / "cache").iterdir()) == []


def test_kafka_home_is_used_instead_of_fetching(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KAFKA_HOME", str(tmp_path))
    with pytest.raises(BrokerUnavailable, match="KAFKA_HOME"):
        kafka_class_path(tmp_path / "cache")

    _linked_jars(tmp_path / "libs")

    assert kafka_class_path(tmp_path / "cache") == str(tmp_path / "libs" / "*")


def test_lock_names_no_host_and_no_place_on_a_machine() -> None:
    sums = read_lock(LOCK)

    assert len(sums) == 46
    assert all(re.fullmatch(r"[\w.-]+(/[\w.-]+)+\.jar", path) for path in sums)
    assert all(re.fullmatch(r"[0-9a-f]{64}", sha256) for sha256 in sums.values())
    assert "://" not in LOCK.read_text()


def _linked_jars(folder: Path) -> Path:
    """Returns `folder`, filled with links to the jars in the user's cache."""
    folder.mkdir(parents=True)
    for jar in ensure_kafka(user_cache()):
        (folder / jar.name).symlink_to(jar)
    return folder


def _settings(kafka: LocalKafka) -> KafkaSettings:
    return KafkaSettings(bootstrap_servers=kafka.bootstrap_servers)


def _create_topic(kafka: LocalKafka) -> str:
    topic = f"broker-{uuid4()}"
    admin = open_admin(_settings(kafka))
    admin.create_topics([NewTopic(topic, 1, 1)])
    admin.close()
    return topic


def _cluster_id(kafka: LocalKafka) -> str:
    admin = open_admin(_settings(kafka))
    cluster = admin.describe_cluster()
    admin.close()
    return str(cluster["cluster_id"])


def _produce(kafka: LocalKafka, topic: str, values: list[bytes]) -> None:
    producer = open_producer(_settings(kafka))
    for value in values:
        producer.send(topic, value)
    producer.flush(timeout=20)
    producer.close()


def _consume(kafka: LocalKafka, topic: str, count: int, timeout_s: float = 20.0) -> list[bytes]:
    consumer = open_consumer(_settings(kafka))
    partition = TopicPartition(topic, 0)
    consumer.assign([partition])
    consumer.seek_to_beginning(partition)
    values: list[bytes] = []
    deadline = time.monotonic() + timeout_s
    while len(values) < count and time.monotonic() < deadline:
        for records in consumer.poll(timeout_ms=200).values():
            values += [record.value for record in records]
    consumer.close()
    return values


def _until(condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "not within the deadline"
        time.sleep(0.05)
