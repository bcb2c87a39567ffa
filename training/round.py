"""One training round: what was shown and what came of it becomes a challenger, and only evidence lets it serve.

`run_round` is the page to read. Everything it writes before step 7 lies in a folder of its own, so dying at any step
leaves what serves as it was; a round that is killed is taken up again by the next, from its last checkpoint, for as
long as its parent still serves.
"""

import fcntl
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Protocol, get_args

import msgspec
import structlog

from tailrace.errors import BundleError, NothingToLearn, ParityError, RoundRunning, TailraceError
from tailrace.events import ModelAnnouncement
from tailrace.ids import ModelVersion
from tailrace.registry import Registry, new_version
from tailrace.rounds import Outcome, RoundLog, RoundRecord
from tailrace.settings import Settings, TrainingSettings
from training.contest import Contest, compare
from training.examples import Example, JoinCounts
from training.export import ExportReport, export_bundle, load_ranker
from training.fine_tune import FineTuned, Job, fine_tune, learn_alone
from training.gate import Guardrails, Verdict, decide
from training.graphs import Precision
from training.kinship import require_kinship
from training.log_window import LogWindow, Window
from training.record import TrainingRecord, load_record, save_record
from training.report import RoundFacts, write_report
from training.rescoring import BundleScorer
from training.trackers import Facts, open_trackers

log = structlog.get_logger()

STEPS = ("champion", "read", "learn", "export", "evaluate", "decide", "publish", "promote")
_PLAN_FILE = "plan.json"
_RECORDED = ("ndcg_10", "auc", "log_loss", "click_rate")

Progress = Callable[[str, int, int], None]  # what is under way, done, in all


class FeedbackLog(Protocol):
    """Where impressions and feedback come from: Kafka, or a simulated world's memory."""

    def plan(self, *, now_ms: int, fresh_since_ms: int | None) -> LogWindow:
        """Returns the window that ends now."""

    def read(self, window: LogWindow, progress: Progress) -> Window:
        """Returns the window's examples: the same ones however often it is read."""


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """What a round is about, fixed at its start; on disk, so that a killed round can be taken up again."""

    version: ModelVersion
    parent: ModelVersion
    generation: int
    window: LogWindow


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


@dataclass(frozen=True)
class RoundParts:
    """Everything a round works with that is not its business: chosen once by the wiring."""

    settings: Settings
    registry: Registry
    rounds: RoundLog
    log: FeedbackLog
    open_scorer: Callable[[Path], BundleScorer]
    announce: Callable[[ModelAnnouncement], None]
    learn: Callable[[Job], FineTuned] = learn_alone
    now: Callable[[], datetime] = lambda: datetime.now(UTC)
    progress: Progress = lambda step, done, total: None
    on_step: Callable[[str], None] = lambda step: None


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


def run_round(parts: RoundParts) -> RoundRecord:
    """Returns what became of the round, which the registry's rounds and the report say too.

    Raises NothingToLearn where there is too little fresh feedback, and RoundRunning where another round runs on this
    machine. Whatever else goes wrong is recorded as a failed round, and raised.
    """
    settings, training = parts.settings, parts.settings.training
    rounds = settings.path("rounds")
    with _alone(rounds):
        # 1. What serves is what the challenger learns on from, and has to hold its own against.
        parts.on_step("champion")
        pointer = parts.registry.pointer()
        if pointer is None:
            raise BundleError("nothing serves yet: `tailrace models init` makes version 0")
        champion_folder = parts.registry.fetch(pointer.champion, settings.path("cache") / "bundles")
        plan = _unfinished(rounds, pointer.champion) or _plan(
            parts, pointer.champion, pointer.generation, champion_folder
        )
        this = Round(plan, rounds / plan.version, parts.now())
        try:
            with _timed(this, parts, "read"):
                # 2. The feedback, joined; then cut by time, because that is how the model will meet it.
                window = parts.log.read(plan.window, parts.progress)
                this.counts, this.replayed = window.counts, len(window.replay)
                this.split = split_by_time(window.fresh, training)
            _keep_plan(this)
            with _timed(this, parts, "learn"):
                # 3. Learn, from the serving weights.
                ranker, tokenizer, card = load_ranker(champion_folder)
                this.tuned = parts.learn(
                    partial(
                        fine_tune,
                        ranker,
                        tokenizer,
                        this.split.train,
                        this.split.stop,
                        window.replay,
                        training,
                        max_user_tokens=card.max_user_tokens,
                        max_item_tokens=card.max_item_tokens,
                        folder=this.folder,
                        facts=_facts(plan),
                        progress=parts.progress,
                    )
                )
            if not this.tuned.better:
                return _end(this, parts, "rejected", f"nothing was learned: {this.tuned.reason}")
            bundle = this.folder / "bundle"
            with _timed(this, parts, "export"):
                # 4. Export and quantize, and prove that what was written says what was learned, of the same texts.
                shutil.rmtree(bundle, ignore_errors=True)
                try:
                    this.exported = export_bundle(
                        this.tuned.ranker,
                        tokenizer,
                        bundle,
                        version=plan.version,
                        base_model=card.base_model,
                        max_user_tokens=card.max_user_tokens,
                        max_item_tokens=card.max_item_tokens,
                        precisions=[one for one in get_args(Precision) if one in card.precisions],
                        progress=parts.progress,
                    )
                    require_kinship(champion_folder, bundle)
                except ParityError as error:
                    return _end(this, parts, "rejected", f"the export strays: {error}")
            with _timed(this, parts, "evaluate"):
                # 5. Both, as they would serve, on the newest impressions, which neither has learned from.
                this.contest = compare(
                    parts.open_scorer(champion_folder),
                    parts.open_scorer(bundle),
                    this.split.holdout,
                    calibrate_on=this.split.stop,
                    learned=[*window.replay, *this.split.train, *this.split.stop],
                    settings=settings,
                    progress=parts.progress,
                )
            with _timed(this, parts, "decide"):
                # 6. Decide.
                guardrails = Guardrails(parity="", latency_ratio=this.contest.latency_ratio)
                this.verdict = decide(
                    this.contest.champion, this.contest.challenger, guardrails, settings.gate, seed=training.seed
                )
            if not this.verdict.promoted:
                return _end(this, parts, "rejected", "; ".join(this.verdict.reasons))
            with _timed(this, parts, "publish"):
                # 7. Publish, the manifest last. From here on the version exists, and serves nobody.
                save_record(_record(this), bundle)
                figures = {name: found.mean for name, found in this.contest.challenger.figures.items()}
                if plan.version not in parts.registry.versions():  # a round killed after this step has published it
                    parts.registry.publish(
                        bundle, version=plan.version, parent=plan.parent, metrics=figures, judged=this.exported.files
                    )
            with _timed(this, parts, "promote"):
                # 8. To a share of the users first, or to all; the pointer must be where it was when the round began.
                share = settings.gate.canary_share
                if share > 0:
                    moved = parts.registry.start_canary(plan.version, share)
                else:
                    moved = parts.registry.promote(plan.version, generation=plan.generation)
                parts.announce(moved)
                parts.registry.prune(settings.registry.keep)
            return _end(this, parts, "canary" if share > 0 else "promoted", "; ".join(this.verdict.reasons))
        except NothingToLearn:
            shutil.rmtree(this.folder, ignore_errors=True)
            raise
        except Exception as error:
            _end(this, parts, "failed", str(error) if isinstance(error, TailraceError) else repr(error))
            raise


def split_by_time(fresh: Sequence[Example], training: TrainingSettings) -> Split:
    """Returns the examples, oldest first, cut into train, stop and holdout. Raises NothingToLearn where too few."""
    if len(fresh) < training.min_examples:
        raise NothingToLearn(f"{len(fresh)} fresh impressions, where a round needs {training.min_examples}")
    holdout = max(min(round(len(fresh) * training.holdout_share), training.max_holdout), 1)
    stop = max(round(len(fresh) * training.stop_share), 1)
    cut = len(fresh) - holdout
    return Split(list(fresh[: cut - stop]), list(fresh[cut - stop : cut]), list(fresh[cut:]))


def _plan(parts: RoundParts, champion: ModelVersion, generation: int, champion_folder: Path) -> Plan:
    record = load_record(champion_folder)
    now = parts.now()
    window = parts.log.plan(
        now_ms=round(now.timestamp() * 1000), fresh_since_ms=None if record is None else record.learned_until_ms
    )
    return Plan(version=new_version(now), parent=champion, generation=generation, window=window)


def _unfinished(rounds: Path, champion: ModelVersion) -> Plan | None:
    """Returns the plan of a round that was killed, if its parent still serves; other leftovers are removed."""
    found: Plan | None = None
    for path in sorted(rounds.glob(f"*/{_PLAN_FILE}")):
        try:
            plan = msgspec.json.decode(path.read_bytes(), type=Plan)
        except msgspec.DecodeError:
            plan = None
        if plan is not None and plan.parent == champion:
            found = plan
            log.info("round taken up again", version=plan.version)
        else:
            shutil.rmtree(path.parent)
    return found


def _keep_plan(this: Round) -> None:
    this.folder.mkdir(parents=True, exist_ok=True)
    (this.folder / _PLAN_FILE).write_bytes(msgspec.json.encode(this.plan))


def _record(this: Round) -> TrainingRecord:
    assert this.split is not None and this.counts is not None
    return TrainingRecord(
        parent=this.plan.parent,
        window=this.plan.window,
        counts=this.counts,
        learned_until_ms=this.split.learned_until_ms,
        fresh=len(this.split.train),
        replayed=this.replayed,
    )


def _end(this: Round, parts: RoundParts, outcome: Outcome, reason: str) -> RoundRecord:
    """Writes the report and the record, removes what was only needed on the way, and returns the record."""
    split, contest = this.split, this.contest
    figures: dict[str, float] = {}
    if contest is not None:
        figures = {
            f"{name}_{figure}": getattr(contest, name).figures[figure].mean
            for name in ("champion", "challenger")
            for figure in _RECORDED
        }
    record = RoundRecord(
        version=this.plan.version,
        parent=this.plan.parent,
        outcome=outcome,
        reason=reason,
        started_at=this.started_at,
        ended_at=parts.now(),
        fresh=0 if split is None else len(split.train) + len(split.stop) + len(split.holdout),
        replayed=this.replayed,
        took_s=this.took_s,
        metrics=figures,
        report=_report(this),
    )
    parts.rounds.append(record)
    # The bundle is in the registry or nowhere; without its plan a round is not taken up again.
    (this.folder / _PLAN_FILE).unlink(missing_ok=True)
    shutil.rmtree(this.folder / "bundle", ignore_errors=True)
    for checkpoint in this.folder.glob("*.safetensors"):
        checkpoint.unlink()
    _conclude(this, record, parts.settings.training)
    log.info("round ended", version=record.version, outcome=outcome, reason=reason, took_s=this.took_s)
    return record


def _facts(plan: Plan) -> Facts:
    window = plan.window
    return {"parent": plan.parent, "since_ms": window.since_ms, "cutoff_ms": window.cutoff_ms}


def _conclude(this: Round, record: RoundRecord, training: TrainingSettings) -> None:
    """Tells the trackers what became of the round: outcome, the gate's figures, both models' metrics, the report."""
    checks = [] if this.verdict is None else this.verdict.checks
    figures = {f"gate/{check.name}": check.figure for check in checks}
    figures |= {f"metrics/{name}": figure for name, figure in record.metrics.items()}
    with open_trackers(training, this.folder, _facts(this.plan)) as trackers:
        trackers.conclude(f"{record.outcome}: {record.reason}", figures, Path(record.report) if record.report else None)


def _report(this: Round) -> str:
    """Writes the round's report and returns where it is; nothing where it ended before there was a verdict."""
    if this.contest is None or this.verdict is None or this.tuned is None or this.counts is None:
        return ""
    tuned = this.tuned
    history: list[dict[str, float | None]] = [
        {**one.losses, "stop": one.stop_loss, "stop NDCG@10": one.stop_ndcg_10} for one in tuned.history
    ]
    facts = RoundFacts(
        version=this.plan.version,
        parent=this.plan.parent,
        began_at=f"{this.started_at:%F %T %Z}",
        read=msgspec.to_builtins(this.counts) | {"replayed": this.replayed, "learned from": tuned.lessons},
        history=history,
        champion=this.contest.champion,
        challenger=this.contest.challenger,
        verdict=this.verdict,
        took_s=this.took_s,
        notes=[tuned.reason, f"{tuned.impressions_per_s:.0f} impressions/s in {tuned.precision}"],
    )
    return str(write_report(this.folder, facts)[1])


@contextmanager
def _timed(this: Round, parts: RoundParts, step: str) -> Iterator[None]:
    parts.on_step(step)
    started = time.monotonic()
    try:
        yield
    finally:
        this.took_s[step] = round(time.monotonic() - started, 3)


@contextmanager
def _alone(rounds: Path) -> Iterator[None]:
    """Holds the lock of this machine's rounds; the system lets go of it when the process dies, however it dies."""
    rounds.mkdir(parents=True, exist_ok=True)
    with (rounds / "lock").open("w") as held:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RoundRunning(f"another round runs on this machine: {rounds / 'lock'} is held") from None
        yield
