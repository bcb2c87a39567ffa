"""Scenes for recovery tests, and how many kills a run makes."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from stream.broker import LocalKafka
from tests.recovery.launcher import Launcher
from tests.recovery.scene import Scene


@pytest.fixture(scope="session")
def launcher() -> Iterator[Launcher]:
    """Starts worker processes quickly."""
    made = Launcher()
    yield made
    made.close()


@pytest.fixture
def scene(tmp_path: Path, kafka: LocalKafka, launcher: Launcher) -> Iterator[Callable[..., Scene]]:
    """Makes scenes on the shared Kafka, and stops their workers afterwards."""
    made: list[Scene] = []

    def make(**options: object) -> Scene:
        folder = tmp_path / f"scene{len(made)}"
        folder.mkdir()
        made.append(Scene(folder, kafka.bootstrap_servers, launcher, **options))  # type: ignore[arg-type]  # options of Scene
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture
def kills() -> int:
    """Random kills per store: TEST_KILLS, 20 where unset. Those of the failure table come on top."""
    return int(os.environ.get("TEST_KILLS", "20"))
