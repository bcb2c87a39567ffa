"""A local Apache Kafka: one KRaft node on loopback, started, found and stopped by Tailrace.

What stands in `data_dir`:
    broker.lock        held by the Kafka process itself for as long as it lives
    broker.json        its port and process id
    server.properties  written anew at every start
    broker.log         what this run of Kafka had to say (warnings and errors); broker.log.1 is the run before
    data/              the records; formatted once
"""

import fcntl
import random
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

import msgspec
from kafka.admin import KafkaAdminClient
from kafka.errors import KafkaError

from stream.bound_process import start_bound
from stream.kafka_jars import kafka_class_path, user_cache
from stream.kafka_java import HOST, find_java, format_storage, java_command, server_properties
from tailrace.errors import BrokerUnavailable

PORTS = range(20_000, 32_000)  # below the ports the system hands out, so a stopped broker finds its own free again


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
            properties = server_properties(place.port, place.controller_port, retention_days)
            (data_dir / "server.properties").write_text(properties)
            # 3. Format once. A cluster id is never made twice.
            if not (data_dir / "data" / "meta.properties").exists():
                format_storage(java, class_path, data_dir)
            # 4. Start, and wait until a client is told about a live broker.
            log = _rotate_log(data_dir)
            command = java_command(java, class_path, heap_mb, "kafka.Kafka", "server.properties")
            process = start_bound(command, log, folder=data_dir, pass_fds=(lock,))
            (data_dir / "broker.json").write_bytes(
                msgspec.json.encode(_Place(place.port, place.controller_port, process.pid))
            )
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
    wanted = [last.port, last.controller_port] if last else []
    candidates = [port] if port is not None else wanted[:1]
    candidates += wanted[1:] + random.sample(PORTS, 100)
    free = [candidate for candidate in dict.fromkeys(candidates) if _is_free(candidate)]
    return _Place(free[0], free[1], 0)


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


def _rotate_log(data_dir: Path) -> Path:
    log = data_dir / "broker.log"
    if log.exists():
        log.replace(data_dir / "broker.log.1")
    return log


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
        admin = KafkaAdminClient(
            bootstrap_servers=bootstrap_servers, client_id="tailrace-start", bootstrap_timeout_ms=2000
        )
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
