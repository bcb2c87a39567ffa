"""What trackers keep of a round: the real libraries, on this machine alone."""

import sys
from pathlib import Path

import pytest
from mlflow import MlflowClient
from msgspec.structs import replace
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from deploy.training_parts import round_parts
from tailrace.errors import SettingsError
from tailrace.registry import open_registry
from tailrace.settings import Settings, TrainingSettings, load_settings
from tests.recovery.round_process import FIRST, make_parts, make_settings, publish_first
from training.round import run_round
from training.trackers import open_trackers

FIGURES = {"train/listwise", "stop/loss", "stop/ndcg_10", "gate/ndcg_10", "metrics/challenger_ndcg_10"}


def tracked_by(settings: Settings, *trackers: str) -> Settings:
    return replace(settings, training=replace(settings.training, trackers=trackers))


def test_round_is_one_run_in_each_tracker_with_parameters_curves_outcome_and_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    settings = tracked_by(make_settings(tmp_path), "tensorboard", "mlflow", "wandb")
    publish_first(open_registry(settings), tmp_path / "v0")
    record = run_round(make_parts(settings))
    assert record.outcome == "promoted", record.reason
    rounds = tmp_path / "rounds"

    # The fine-tune opened each run, and the round's end opened it again.
    events = EventAccumulator(str(rounds / record.version / "tensorboard")).Reload()
    assert set(events.Tags()["scalars"]) >= FIGURES
    assert len(events.Scalars("train/listwise")) > 1

    client = MlflowClient(tracking_uri=f"sqlite:///{rounds / 'mlflow.db'}")
    [run] = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    assert (run.info.run_name, run.info.status) == (record.version, "FINISHED")
    assert run.data.params.items() >= {"parent": FIRST, "training.epochs": "2", "training.seed": "0"}.items()
    assert run.data.metrics.keys() >= FIGURES
    assert run.data.tags["outcome"].startswith("promoted: NDCG@10")
    assert [file.path for file in client.list_artifacts(run.info.run_id)] == ["report.html"]

    kept = [path.read_bytes() for path in (rounds / record.version / "wandb").glob("offline-run-*/*.wandb")]
    assert all(any(name.encode() in one for one in kept) for name in [*FIGURES, "outcome", "report.html"])
    assert len({path.name for path in (rounds / record.version / "wandb").glob("offline-run-*/*.wandb")}) == 1


def test_tracker_that_fails_is_left_out_and_the_others_go_on(tmp_path: Path) -> None:
    settings = TrainingSettings(trackers=("mlflow", "tensorboard"), tracking_uri="nowhere://at-all")
    with open_trackers(settings, tmp_path, {}) as trackers:
        trackers.write({"train/listwise": 0.5}, 7)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(point.step, point.value) for point in events.Scalars("train/listwise")] == [(7, 0.5)]


@pytest.mark.parametrize("name", ["mlflow", "wandb"])
def test_tracker_that_is_not_installed_is_said_before_a_round_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
    settings = load_settings(None, {"TAILRACE_TRAINING__TRACKERS": f'["{name}"]'}, data_dir=str(tmp_path))
    with pytest.raises(SettingsError, match=rf"training.trackers: {name} is not installed.*tailrace\[trackers\]"):
        round_parts(settings, lambda what, done, total: None)
    assert not list(tmp_path.iterdir())
