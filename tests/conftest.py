"""The servers every test may share. Tests use topics, groups and keys of their own, so nothing is ever wiped."""

from collections.abc import Iterator

import pytest

from stream.broker import LocalKafka
from tests.servers import start_valkey


@pytest.fixture(scope="session")
def kafka(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalKafka]:
    """A running Apache Kafka. Put a `topic_prefix` of your own before your topics."""
    with LocalKafka.start(tmp_path_factory.mktemp("kafka")) as broker:
        yield broker


@pytest.fixture(scope="session")
def valkey(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a running Valkey that keeps nothing on disk."""
    server = start_valkey(tmp_path_factory.mktemp("valkey"))
    yield server.url
    server.stop()
