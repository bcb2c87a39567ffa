"""The whole service, once for the tests of this package, since a process has one Ray at a time."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from deploy.ray_cluster import ray_cluster
from services.app import start_serving, stop_serving
from stream.broker import LocalKafka
from tailrace.features import FEATURE_NAMES, PRIOR_WEIGHTS
from tailrace.ids import ModelVersion
from tailrace.kafka_clients import create_topics
from tailrace.registry import Registry, open_registry
from tailrace.settings import Settings, load_settings
from tests.e2e.scene import Scene, StreamWorker, book, until
from tests.servers import free_port
from training.export import build_version_zero

NUM_BOOKS = 200


@pytest.fixture(scope="package")
def scene(kafka: LocalKafka, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scene]:
    """A service that is ready, on the version `v1`, with two rankers; `v2` is published but not promoted."""
    folder = tmp_path_factory.mktemp("service")
    settings = load_settings(
        None,
        {},
        data_dir=str(folder),
        log_level="warning",
        kafka={"bootstrap_servers": kafka.bootstrap_servers, "topic_prefix": "e2e-", "user_partitions": 2},
        gateway={"port": free_port(), "max_ongoing_requests": 8, "max_queued_requests": 8},
        ranker={"deadline_s": 5.0, "min_replicas": 2, "max_replicas": 2},
        stream={"stats_interval_s": 0.2, "metrics_port": 0},
        store={"sync": False},
    )
    create_topics(settings.kafka)
    registry = open_registry(settings)
    _publish_bundles(folder / "bundle", registry)
    registry.promote(ModelVersion("v1"))
    (folder / "tailrace.toml").write_text(_toml(settings))
    worker = StreamWorker(folder)
    with ray_cluster():
        url = start_serving(settings)
        with httpx.Client(base_url=url, timeout=20.0) as client:
            found = Scene(settings, client, registry, folder / "bundle", worker)
            found.produce_items([book(number) for number in range(NUM_BOOKS)])
            until(lambda: client.get("/readyz"), lambda response: response.status_code == 200, timeout_s=60)
            until(lambda: found.everywhere("items"), lambda items: items == NUM_BOOKS, timeout_s=60)
            yield found
        stop_serving()
    worker.stop()


def _publish_bundles(folder: Path, registry: Registry) -> None:
    build_version_zero(
        folder,
        version=ModelVersion("v1"),
        feature_names=FEATURE_NAMES,
        prior=PRIOR_WEIGHTS,
        precisions=("int8",),
    )
    for version in ("v1", "v2"):
        registry.publish(folder, version=ModelVersion(version))


def _toml(settings: Settings) -> str:
    kafka, stream = settings.kafka, settings.stream
    return f"""
data_dir = "{settings.data_dir}"
[kafka]
bootstrap_servers = "{kafka.bootstrap_servers}"
topic_prefix = "{kafka.topic_prefix}"
user_partitions = {kafka.user_partitions}
[stream]
stats_interval_s = {stream.stats_interval_s}
metrics_port = 0
[store]
sync = false
"""
