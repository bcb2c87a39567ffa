"""The whole system on one machine: what `make demo` and `tailrace up` run. The one place that wires it."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import msgspec
import ray
from structlog import get_logger

from services.app import start_serving, stop_serving
from stream.broker import LocalKafka
from stream.supervisor import supervise
from tailrace.errors import BundleError
from tailrace.kafka_clients import create_topics
from tailrace.settings import Settings

log = get_logger()


@contextmanager
def local_system(settings: Settings, tell: Callable[[str], None]) -> Iterator[Settings]:
    """Yields the settings of a running system and stops everything it started, in reverse order.

    `tell` receives one line per stage, for a person to read. With `kafka.bootstrap_servers` set, that cluster is used.
    """
    with ExitStack() as stack:
        # 1. Exporting model version 0 takes the longest: it runs beside the rest, in a process that may load torch.
        export = stack.enter_context(_model_in_registry(settings))
        # 2. Kafka, and its topics.
        if not settings.kafka.bootstrap_servers:
            tell("Kafka: fetching it once, then starting it")
            broker = LocalKafka.start(settings.path("kafka"))
            stack.callback(broker.stop)
            kafka = msgspec.structs.replace(settings.kafka, bootstrap_servers=broker.bootstrap_servers)
            settings = msgspec.structs.replace(settings, kafka=kafka)
        create_topics(settings.kafka)
        tell(f"Kafka answers at {settings.kafka.bootstrap_servers}")
        # 3. Ray, on loopback, with its files in a short path (its sockets allow about a hundred characters).
        stack.enter_context(_local_ray())
        tell("Ray is up")
        # 4. The stream workers, supervised from a thread of this process.
        stop = threading.Event()
        supervisor = threading.Thread(target=supervise, args=(settings,), kwargs={"stop": stop}, name="supervisor")
        supervisor.start()
        stack.callback(supervisor.join)
        stack.callback(stop.set)
        # 5. The services, once there is a model to serve.
        tell("Model version 0: waiting for its export")
        if export.wait() != 0:
            raise BundleError(f"`tailrace models init` failed: {export.communicate()[1].strip()[-2000:]}")
        stack.callback(stop_serving)
        start_serving(settings)
        tell(f"Serving at http://{settings.gateway.host}:{settings.gateway.port}")
        yield settings


@contextmanager
def _model_in_registry(settings: Settings) -> Iterator[subprocess.Popen[str]]:
    with tempfile.NamedTemporaryFile("w", suffix=".toml") as file:
        file.write(f"data_dir = {json.dumps(settings.data_dir)}\n")
        file.flush()
        command = [sys.executable, "-m", "tailrace.cli", "--settings", file.name, "models", "init"]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
            try:
                yield process
            finally:
                process.terminate()


@contextmanager
def _local_ray() -> Iterator[None]:
    folder = Path(tempfile.mkdtemp(prefix="tailrace-ray-"))
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    try:
        ray.init(
            num_cpus=max(os.cpu_count() or 1, 4),
            include_dashboard=False,
            namespace="tailrace",
            object_store_memory=200 * 2**20,
            log_to_driver=False,
            _node_ip_address="127.0.0.1",
            _temp_dir=str(folder),
        )
        yield
    finally:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)
