"""A trainer killed at every step of a round: what serves is as it was, and the next round succeeds."""

import fcntl
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from tailrace.errors import BrokerUnavailable, BundleError, Pinned, RoundRunning
from tailrace.events import ModelAnnouncement
from tailrace.ids import ModelVersion
from tailrace.registry import open_registry
from tailrace.rounds import open_round_log
from tailrace.settings import Settings
from tests.recovery.round_process import FIRST, MadeUpLog, make_parts, make_settings, publish_first
from training.fine_tune import FineTuned, Job, learn_alone
from training.log_window import AlreadyRead, LogWindow
from training.round import STEPS, run_round
from training.round_state import Plan


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


def run_until_killed(data: Path, step: str) -> None:
    """Runs a round in a process that is killed at the step."""
    command = [sys.executable, "-m", "tests.recovery.round_process", str(data), step]
    assert subprocess.run(command, check=False, timeout=240).returncode == -signal.SIGKILL


def with_canary(settings: Settings, share: float) -> Settings:
    """Returns settings under which a challenger is a canary first."""
    return msgspec.structs.replace(settings, gate=msgspec.structs.replace(settings.gate, canary_share=share))


@pytest.mark.parametrize("step", STEPS)
def test_round_killed_at_a_step_leaves_what_serves_and_the_next_succeeds(data: Path, step: str) -> None:
    settings = make_settings(data)
    registry = open_registry(settings)
    run_until_killed(data, step)
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
    run_until_killed(data, "export")
    [begun] = [path.name for path in (data / "rounds").iterdir() if path.is_dir()]
    record = run_round(make_parts(settings))
    assert record.version == begun and record.outcome == "promoted"


def test_round_that_is_killed_again_and_again_is_given_up_and_says_so(data: Path) -> None:
    settings = make_settings(data)
    for _ in range(3):
        run_until_killed(data, "export")
    [begun] = [path.name for path in (data / "rounds").iterdir() if path.is_dir()]
    record = run_round(make_parts(settings))
    assert record.version != begun and record.outcome == "promoted"
    newest = open_round_log(settings).newest()
    assert [(one.version, one.outcome) for one in newest] == [(record.version, "promoted"), (begun, "failed")]
    assert newest[1].reason == "killed 3 times, and given up"


def test_round_that_could_not_begin_is_recorded(data: Path) -> None:
    settings = make_settings(data)

    class NoBroker(MadeUpLog):
        def plan(self, *, now_ms: int, already: AlreadyRead | None) -> LogWindow:
            raise BrokerUnavailable("nobody answers at 127.0.0.1:9")

    with pytest.raises(BrokerUnavailable):
        run_round(replace(make_parts(settings), log=NoBroker()))
    [record] = open_round_log(settings).newest()
    assert (record.outcome, record.parent) == ("failed", FIRST)
    assert record.reason == "not begun: nobody answers at 127.0.0.1:9"


def test_round_that_learned_nothing_leaves_a_report_of_it(data: Path) -> None:
    def learn_in_vain(job: Job) -> FineTuned:
        found = learn_alone(job)
        assert found.precision == "the precision that serves"
        return replace(found, better=False, reason="nothing beats the parent")

    record = run_round(replace(make_parts(make_settings(data)), learn=learn_in_vain))
    assert record.outcome == "rejected"
    page = Path(record.report).read_text()
    assert "nothing beats the parent" in page and "losses by epoch" in page
    assert "What exploration costs" in page


def test_rounds_do_not_overlap(data: Path) -> None:
    settings = make_settings(data)
    (data / "rounds").mkdir()
    with (data / "rounds" / "lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(RoundRunning, match="lock"):
            run_round(make_parts(settings))
    assert run_round(make_parts(settings)).outcome == "promoted"


@pytest.mark.parametrize("share", [0.0, 0.2])
def test_pointer_moved_during_a_round_stops_its_promotion(data: Path, share: float) -> None:
    settings = with_canary(make_settings(data), share)
    parts = make_parts(settings)
    registry = parts.registry
    second = registry.versions()[0]

    def on_step(step: str) -> None:
        if step == "promote":  # there and back: what serves is the same, but somebody wanted it so
            registry.pin(second)
            registry.unpin()

    with pytest.raises(BundleError, match="meanwhile"):
        run_round(replace(parts, on_step=on_step))
    pointer = registry.pointer()
    assert pointer is not None and pointer.champion == FIRST
    [record] = open_round_log(settings).newest()
    assert record.outcome == "failed" and record.reason


def test_round_killed_after_its_canary_began_announces_it_again_unless_it_was_taken_back(data: Path) -> None:
    settings = with_canary(make_settings(data), 0.2)
    registry = open_registry(settings)
    parts = make_parts(settings)
    told: list[ModelAnnouncement] = []

    def die(announcement: ModelAnnouncement) -> None:
        raise KeyboardInterrupt  # no Exception: the round records nothing, as if it had been killed

    def killed_round() -> ModelVersion:
        with pytest.raises(KeyboardInterrupt):
            run_round(replace(parts, announce=die))
        pointer = registry.pointer()
        assert pointer is not None and pointer.canary is not None
        return pointer.canary

    canary = killed_round()
    record = run_round(replace(parts, announce=told.append))
    assert (record.version, record.outcome, told[0].canary) == (canary, "canary", canary)
    registry.rollback()

    condemned = killed_round()
    registry.rollback()
    with pytest.raises(BundleError, match="meanwhile"):
        run_round(parts)
    pointer = registry.pointer()
    assert pointer is not None and pointer.canary is None
    assert [one.outcome for one in open_round_log(settings).newest() if one.version == condemned] == ["failed"]


def test_no_round_begins_where_its_challenger_could_not_follow(data: Path) -> None:
    settings = make_settings(data)
    registry = open_registry(settings)
    registry.pin(FIRST)
    with pytest.raises(Pinned):
        run_round(make_parts(settings))
    registry.unpin()
    other = registry.publish(data / "registry" / "bundles" / FIRST, version=ModelVersion("other")).version
    registry.start_canary(other, 0.2)
    with pytest.raises(BundleError, match="other is the canary"):
        run_round(make_parts(settings))
    assert open_round_log(settings).newest() == []


def test_round_recorded_and_killed_before_it_was_tidied_up_is_over(data: Path) -> None:
    settings = with_canary(make_settings(data), 0.2)
    parts = make_parts(settings)
    record = run_round(parts)
    (data / "rounds" / record.version / "plan.json").write_bytes(
        msgspec.json.encode(
            Plan(
                version=record.version,
                parent=FIRST,
                generation=1,
                window=parts.log.plan(now_ms=round(record.started_at.timestamp() * 1000), already=None),
            )
        )
    )
    assert run_round(parts).version == record.version
    assert open_round_log(settings).newest() == [record]
    assert not (data / "rounds" / record.version / "plan.json").exists()
