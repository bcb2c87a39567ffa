"""Where the figures of a fine-tune go: TensorBoard files, MLflow, Weights & Biases, any of them by setting.

One interface for all. A tracked run belongs to a folder: opened again for that folder, by another process or after a
kill, it is gone on with. Learning does not depend on trackers: one that fails is left out from then on, and said.
"""

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol
from uuid import uuid4

import msgspec
import structlog

from tailrace.errors import SettingsError
from tailrace.settings import TrainingSettings

log = structlog.get_logger()

Facts = Mapping[str, str | int | float]

PROJECT = "tailrace"  # what MLflow calls an experiment
_ABOUT_TRACKING = ("trackers", "tracking_uri")


@dataclass(frozen=True)
class TrackedRun:
    """What a tracker opens. The folder's name is the run's; steps from `from_step` on are written now, or anew."""

    folder: Path
    facts: Facts
    uri: str = ""
    from_step: int | None = None


class Tracker(Protocol):
    """A run in one tracker; making one opens it."""

    def write(self, figures: Mapping[str, float], step: int) -> None:
        """Adds a point to the curve of each figure."""

    def conclude(self, outcome: str, figures: Mapping[str, float], report: Path | None) -> None:
        """Says what became of the run in the end."""

    def close(self) -> None:
        """Lets go of the run; what was written is kept."""


class TensorBoardTracker:
    """Event files in the run's folder, to be looked at with `tensorboard --logdir`."""

    def __init__(self, run: TrackedRun) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run.folder / "tensorboard"), purge_step=run.from_step)
        if run.from_step is not None:
            self._writer.add_text("parameters", "\n\n".join(f"{name}: {fact}" for name, fact in run.facts.items()))

    def write(self, figures: Mapping[str, float], step: int) -> None:
        """Adds a point to the curve of each figure."""
        for name, figure in figures.items():
            self._writer.add_scalar(name, figure, step)

    def conclude(self, outcome: str, figures: Mapping[str, float], report: Path | None) -> None:
        """Says what became of the run; the report lies beside the event files already."""
        self._writer.add_text("outcome", outcome)
        self.write(figures, 0)

    def close(self) -> None:
        """Writes out what is held."""
        self._writer.close()


class MlflowTracker:
    """A run of MLflow, in the database beside the run's folder unless a tracking URI is set."""

    def __init__(self, run: TrackedRun) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        from mlflow import MlflowClient

        beside = run.folder.parent
        self._client = MlflowClient(tracking_uri=run.uri or f"sqlite:///{beside / 'mlflow.db'}")
        self._run_id = _once(run.folder / "mlflow-run", lambda: self._create(run, beside))
        self._client.update_run(self._run_id, status="RUNNING")
        for name, fact in run.facts.items():
            self._client.log_param(self._run_id, name, fact)

    def write(self, figures: Mapping[str, float], step: int) -> None:
        """Adds a point to the curve of each figure."""
        from mlflow.entities import Metric

        now_ms = round(time.time() * 1000)
        metrics = [Metric(name, figure, now_ms, step) for name, figure in figures.items()]
        self._client.log_batch(self._run_id, metrics=metrics)

    def conclude(self, outcome: str, figures: Mapping[str, float], report: Path | None) -> None:
        """Adds the outcome as a tag, figures, and the report as an artifact."""
        self._client.set_tag(self._run_id, "outcome", outcome)
        self.write(figures, 0)
        if report is not None:
            self._client.log_artifact(self._run_id, str(report))

    def close(self) -> None:
        """Marks the run as finished, until it is opened again."""
        self._client.set_terminated(self._run_id)

    def _create(self, run: TrackedRun, beside: Path) -> str:
        found = self._client.get_experiment_by_name(PROJECT)
        artifacts = None if run.uri else (beside / "mlflow").as_uri()
        experiment = found.experiment_id if found else self._client.create_experiment(PROJECT, artifacts)
        created: str = self._client.create_run(experiment, run_name=run.folder.name).info.run_id
        return created


class WandbTracker:
    """A run of Weights & Biases: on this machine only, unless `WANDB_MODE` says otherwise."""

    def __init__(self, run: TrackedRun) -> None:
        os.environ.setdefault("WANDB_MODE", "offline")
        import wandb

        self._run: Any = wandb.init(
            project=PROJECT,
            name=run.folder.name,
            id=_once(run.folder / "wandb-run", lambda: uuid4().hex),
            resume="allow",
            dir=run.folder,
            config=dict(run.facts),
            settings=wandb.Settings(silent=True, console="off", disable_git=True, save_code=False),
        )

    def write(self, figures: Mapping[str, float], step: int) -> None:
        """Adds a point to the curve of each figure."""
        self._run.log(dict(figures), step=step)

    def conclude(self, outcome: str, figures: Mapping[str, float], report: Path | None) -> None:
        """Puts outcome and figures into the run's summary, and adds the report as an artifact."""
        self._run.summary.update({"outcome": outcome, **figures})
        if report is not None:
            self._run.log_artifact(report, name=f"report-{self._run.id}", type="report")

    def close(self) -> None:
        """Writes out what is held, and sends it where the mode says so."""
        self._run.finish()


_KINDS: Mapping[str, tuple[str, Callable[[TrackedRun], Tracker]]] = {
    "tensorboard": ("tensorboard", TensorBoardTracker),
    "mlflow": ("mlflow", MlflowTracker),
    "wandb": ("wandb", WandbTracker),
}


class Trackers:
    """All trackers of a run as one, without those that have failed."""

    def __init__(self) -> None:
        self._open: dict[str, Tracker] = {}

    def open(self, name: str, run: TrackedRun) -> None:
        """Adds a tracker."""
        with self._left_out_if_it_fails(name):
            self._open[name] = _KINDS[name][1](run)

    def write(self, figures: Mapping[str, float], step: int) -> None:
        """Adds a point to the curve of each figure."""
        self._each(lambda tracker: tracker.write(figures, step))

    def conclude(self, outcome: str, figures: Mapping[str, float], report: Path | None) -> None:
        """Says what became of the run in the end."""
        self._each(lambda tracker: tracker.conclude(outcome, figures, report))

    def close(self) -> None:
        """Lets go of the run; what was written is kept."""
        self._each(lambda tracker: tracker.close())

    def _each(self, tell: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self._open.items()):
            with self._left_out_if_it_fails(name):
                tell(tracker)

    @contextmanager
    def _left_out_if_it_fails(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # whatever a tracking library raises; the round is worth more than its curves
            log.warning("tracker left out", tracker=name, error=str(error))
            self._open.pop(name, None)


@contextmanager
def open_trackers(
    settings: TrainingSettings, folder: Path, facts: Facts, *, from_step: int | None = None
) -> Iterator[Trackers]:
    """Gives the trackers that the settings name. Raises SettingsError where the package of one is not installed."""
    require_trackers(settings)
    parameters = {
        f"training.{name}": value
        for name, value in msgspec.structs.asdict(settings).items()
        if name not in _ABOUT_TRACKING
    }
    folder.mkdir(parents=True, exist_ok=True)
    trackers = Trackers()
    for name in dict.fromkeys(settings.trackers):
        trackers.open(name, TrackedRun(folder, {**facts, **parameters}, settings.tracking_uri, from_step))
    try:
        yield trackers
    finally:
        trackers.close()


def require_trackers(settings: TrainingSettings) -> None:
    """Raises SettingsError where the package of a tracker is not installed. Imports none: that takes seconds."""
    for name in settings.trackers:
        if find_spec(_KINDS[name][0]) is None:
            raise SettingsError(
                f"training.trackers: {name} is not installed; pip install 'tailrace[trackers]' brings it"
            )


def _once(path: Path, make: Callable[[], str]) -> str:
    """Returns what the file says; the first time what `make` does, which the file says from then on."""
    if not path.exists():
        path.write_text(make())
    return path.read_text()
