"""The whole system on one machine: what `make demo` and `tailrace up` run. The one place that wires it."""

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import msgspec
from msgspec.structs import asdict

from deploy.ray_cluster import ray_cluster
from deploy.training_job import train_by_schedule
from services.app import start_serving, stop_serving
from stream.broker import LocalKafka
from stream.supervisor import supervise
from tailrace.errors import BundleError
from tailrace.kafka_clients import create_topics
from tailrace.rounds import RoundRecord
from tailrace.settings import Settings
from training.schedule import Schedule


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
        # 3. Ray, on loopback.
        stack.enter_context(ray_cluster(keep_logs=settings.path("logs") / "ray"))
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
            raise BundleError(f"`tailrace models init` failed; {settings.path('logs') / 'model.log'} says why")
        stack.callback(stop_serving)
        start_serving(settings)
        tell(f"Serving at http://{settings.gateway.host}:{settings.gateway.port}")
        yield settings


@contextmanager
def rounds_beside(settings: Settings, schedule: Schedule, tell: Callable[[str], None]) -> Iterator[None]:
    """Runs training rounds by schedule, from another thread of this process, while the block lasts; tells of each."""
    stop = threading.Event()
    training = threading.Thread(
        target=train_by_schedule,
        args=(settings, schedule),
        kwargs={"stop": stop, "ended": lambda record: tell(describe_round(record))},
        name="training",
    )
    training.start()
    try:
        yield
    finally:
        stop.set()
        training.join()


def describe_round(record: RoundRecord) -> str:
    """Returns one line about a round that has ended."""
    took_s = sum(record.took_s.values())
    return f"Round {record.version}, on {record.fresh} impressions, {took_s:.0f} s: {record.outcome}; {record.reason}"


@contextmanager
def _model_in_registry(settings: Settings) -> Iterator[subprocess.Popen[bytes]]:
    """Runs `tailrace models init` with these settings; what it says goes to logs/model.log."""
    told = {f"TAILRACE_REGISTRY__{name.upper()}": str(value) for name, value in asdict(settings.registry).items()}
    environ = os.environ | told | {"TAILRACE_DATA_DIR": settings.data_dir}
    path = settings.path("logs") / "model.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "tailrace.cli", "models", "init"]
    with path.open("ab") as log, subprocess.Popen(command, stdout=log, stderr=log, env=environ) as process:
        try:
            yield process
        finally:
            process.terminate()
