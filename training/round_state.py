"""A round as it stands: its plan, its examples, what is known of it so far, and how it ends."""

import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

import msgspec
import structlog

from tailrace.errors import NothingToLearn, TooLittleOverlap
from tailrace.ids import ModelVersion
from tailrace.rounds import Outcome, RoundLog, RoundRecord
from tailrace.settings import TrainingSettings
from training.contest import Contest
from training.evaluate import Evaluation
from training.examples import Example, JoinCounts
from training.exploration import without_exploration
from training.export import ExportReport
from training.fine_tune import FineTuned
from training.first_step import Factors
from training.gate import Verdict
from training.log_window import LogWindow
from training.off_policy import OffPolicy
from training.record import TrainingRecord
from training.report import RoundFacts, write_report
from training.trackers import Facts, open_trackers

log = structlog.get_logger()

PLAN_FILE = "plan.json"
_RECORDED = ("ndcg_10", "auc", "log_loss", "click_rate")


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What a round is about, fixed at its start; on disk, so that a killed round can be taken up again."""

    version: ModelVersion
    parent: ModelVersion
    generation: int
    window: LogWindow
    attempts: int = 1  # of which all but the last were killed


@dataclass(frozen=True)
class Split:
    """Fresh examples in time order, cut in three: learned from, stopped on, decided on."""

    train: list[Example]
    stop: list[Example]
    holdout: list[Example]

    @property
    def learned_until_ms(self) -> int:
        """The time of the first impression that was not learned from."""
        return self.holdout[0].at_ms


@dataclass
class Round:
    """What is known of a round so far; its report is made of it."""

    plan: Plan
    folder: Path
    started_at: datetime
    counts: JoinCounts | None = None
    split: Split | None = None
    replayed: int = 0
    tuned: FineTuned | None = None
    exported: ExportReport | None = None
    contest: Contest | None = None
    verdict: Verdict | None = None
    took_s: dict[str, float] = field(default_factory=dict)


def split_by_time(fresh: Sequence[Example], training: TrainingSettings) -> Split:
    """Returns the examples, oldest first, cut into train, stop and holdout. Raises NothingToLearn where too few."""
    if len(fresh) < training.min_examples:
        raise NothingToLearn(f"{len(fresh)} fresh impressions, where a round needs {training.min_examples}")
    holdout = max(min(round(len(fresh) * training.holdout_share), training.max_holdout), 1)
    stop = max(round(len(fresh) * training.stop_share), 1)
    cut = len(fresh) - holdout
    return Split(list(fresh[: cut - stop]), list(fresh[cut - stop : cut]), list(fresh[cut:]))


def facts_of(plan: Plan) -> Facts:
    """Returns what trackers are told of a round before it begins."""
    window = plan.window
    return {"parent": plan.parent, "since_ms": window.since_ms, "cutoff_ms": window.cutoff_ms}


def training_record(this: Round) -> TrainingRecord:
    """Returns what a published bundle says of how it came about."""
    assert this.split is not None and this.counts is not None
    return TrainingRecord(
        parent=this.plan.parent,
        window=this.plan.window,
        counts=this.counts,
        learned_until_ms=this.split.learned_until_ms,
        fresh=len(this.split.train),
        replayed=this.replayed,
    )


def finite_means(judged: Evaluation) -> dict[str, float]:
    """Returns the figures by name but those that no slate could tell: JSON knows no NaN."""
    return {name: found.mean for name, found in judged.figures.items() if math.isfinite(found.mean)}


def record_failure(
    rounds: RoundLog, version: ModelVersion, parent: ModelVersion, reason: str, began: datetime, now: datetime
) -> None:
    """Records a round that failed before or beyond its steps, so that it is seen where others are."""
    _append(
        rounds,
        RoundRecord(version=version, parent=parent, outcome="failed", reason=reason, started_at=began, ended_at=now),
    )


def end_round(
    this: Round, rounds: RoundLog, training: TrainingSettings, outcome: Outcome, reason: str, now: datetime
) -> RoundRecord:
    """Writes the report and the record, removes what was only needed on the way, and returns the record."""
    split, contest = this.split, this.contest
    figures: dict[str, float] = {}
    if contest is not None:
        for name, judged in (("champion", contest.champion), ("challenger", contest.challenger)):
            means = finite_means(judged)
            figures |= {f"{name}_{figure}": means[figure] for figure in _RECORDED if figure in means}
    record = RoundRecord(
        version=this.plan.version,
        parent=this.plan.parent,
        outcome=outcome,
        reason=reason,
        started_at=this.started_at,
        ended_at=now,
        fresh=0 if split is None else len(split.train) + len(split.stop) + len(split.holdout),
        replayed=this.replayed,
        took_s=this.took_s,
        metrics=figures,
        report=_report(this, f"{outcome}: {reason}"),
    )
    _append(rounds, record)
    # The bundle is in the registry or nowhere; without its plan a round is not taken up again.
    (this.folder / PLAN_FILE).unlink(missing_ok=True)
    shutil.rmtree(this.folder / "bundle", ignore_errors=True)
    for checkpoint in this.folder.glob("*.safetensors"):
        checkpoint.unlink()
    _conclude(this, record, training)
    log.info("round ended", version=record.version, outcome=outcome, reason=reason, took_s=this.took_s)
    return record


def _append(rounds: RoundLog, record: RoundRecord) -> None:
    try:
        rounds.append(record)
    except FileExistsError:  # killed after it was written, and taken up again: what it said stands
        log.warning("the round is recorded already", version=record.version)


def _conclude(this: Round, record: RoundRecord, training: TrainingSettings) -> None:
    """Tells the trackers what became of the round: outcome, the gate's figures, both models' metrics, the report."""
    checks = [] if this.verdict is None else this.verdict.checks
    figures = {f"gate/{check.name}": check.figure for check in checks}
    figures |= {f"metrics/{name}": figure for name, figure in record.metrics.items()}
    with open_trackers(training, this.folder, facts_of(this.plan)) as trackers:
        trackers.conclude(f"{record.outcome}: {record.reason}", figures, Path(record.report) if record.report else None)


def _report(this: Round, ended: str) -> str:
    """Writes what there is to report and returns where it is; nothing where it could not be written."""
    contest, tuned, notes = this.contest, this.tuned, list[str]()
    read: dict[str, int | float | str] = {} if this.counts is None else msgspec.to_builtins(this.counts)
    if tuned is not None:
        read |= {"replayed": this.replayed, "learned from": tuned.lessons}
        speed = f"{tuned.impressions_per_s:.0f} impressions/s, BERT in {tuned.precision}"
        notes = [tuned.reason, _describe_step(tuned.first_step), speed]
    facts = RoundFacts(
        version=this.plan.version,
        parent=this.plan.parent,
        began_at=f"{this.started_at:%F %T %Z}",
        ended=ended,
        read=read,
        history=[
            {**one.losses, "stop": one.stop_loss, "stop NDCG@10": one.stop_ndcg_10}
            for one in (() if tuned is None else tuned.history)
        ],
        judged=None if contest is None else (contest.champion, contest.challenger),
        verdict=this.verdict,
        took_s=this.took_s,
        moves=() if contest is None else contest.moves,
        unexplored="" if this.split is None else _unexplored(this.split),
        notes=notes,
    )
    try:
        return str(write_report(this.folder, facts)[1])
    except OSError as error:  # a full disk, of which the record says more
        log.warning("the report could not be written", version=this.plan.version, error=str(error))
        return ""


def _unexplored(split: Split) -> OffPolicy | str:
    try:
        return without_exploration([*split.train, *split.stop, *split.holdout])
    except TooLittleOverlap as error:
        return str(error)


def _describe_step(factors: Factors | None) -> str:
    if factors is None:
        return "nothing was learned of tastes"
    tastes, topics, rest = factors
    return f"parts kept: {tastes:.2f} of tastes learned anew, {topics:.2f} of topics' features, {rest:.2f} of the rest"
