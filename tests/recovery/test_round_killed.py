"""A trainer killed at every step of a round: what serves is as it was, and the next round succeeds."""

import fcntl
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tailrace.errors import BundleError, RoundRunning
from tailrace.registry import open_registry
from tailrace.rounds import open_round_log
from tests.recovery.round_process import FIRST, make_parts, make_settings, publish_first
from training.round import STEPS, run_round


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder in which version 0 serves."""
    folder = tmp_path_factory.mktemp("first")
    publish_first(open_registry(make_settings(folder)), folder / "v0")
    return folder


@pytest.fixture
def data(first: Path, tmp_path: Path) -> Path:
    """A copy of it for one test."""
    return Path(shutil.copytree(first / "registry", tmp_path / "data" / "registry")).parent


@pytest.mark.parametrize("step", STEPS)
def test_round_killed_at_a_step_leaves_what_serves_and_the_next_succeeds(data: Path, step: str) -> None:
    settings = make_settings(data)
    registry = open_registry(settings)
    killed = subprocess.run(
        [sys.executable, "-m", "tests.recovery.round_process", str(data), step], check=False, timeout=120
    )
    assert killed.returncode == -signal.SIGKILL
    pointer = registry.pointer()
    assert pointer is not None and pointer.champion == FIRST
    # Published or not, a version is whole: every one there can be fetched, its sums checked.
    for version in registry.versions():
        registry.fetch(version, data / "cache")

    record = run_round(make_parts(settings))
    assert record.outcome == "promoted", record.reason
    pointer = registry.pointer()
    assert pointer is not None and pointer.champion == record.version
    assert [one.version for one in open_round_log(settings).newest()] == [record.version]
    assert sorted(path.name for path in (data / "rounds").iterdir()) == ["lock", record.version]


def test_round_killed_while_learning_is_taken_up_again(data: Path) -> None:
    settings = make_settings(data)
    command = [sys.executable, "-m", "tests.recovery.round_process", str(data), "export"]
    assert subprocess.run(command, check=False, timeout=120).returncode == -signal.SIGKILL
    [begun] = [path.name for path in (data / "rounds").iterdir() if path.is_dir()]
    record = run_round(make_parts(settings))
    assert record.version == begun and record.outcome == "promoted"


def test_rounds_do_not_overlap(data: Path) -> None:
    settings = make_settings(data)
    (data / "rounds").mkdir()
    with (data / "rounds" / "lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(RoundRunning, match="lock"):
            run_round(make_parts(settings))
    assert run_round(make_parts(settings)).outcome == "promoted"


def test_pointer_moved_during_a_round_stops_its_promotion(data: Path) -> None:
    settings = make_settings(data)
    parts = make_parts(settings)
    registry = parts.registry
    second = registry.versions()[0]

    def on_step(step: str) -> None:
        if step == "promote":
            registry.pin(second)

    with pytest.raises(BundleError, match=r"pinned|meanwhile"):
        run_round(replace(parts, on_step=on_step))
    pointer = registry.pointer()
    assert pointer is not None and pointer.champion == FIRST
    [record] = open_round_log(settings).newest()
    assert record.outcome == "failed" and record.reason
