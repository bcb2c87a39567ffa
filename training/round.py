"""One training round: what was shown and what came of it becomes a challenger, and only evidence lets it serve.

`run_round` is the page to read. Everything it writes before step 7 lies in a folder of its own, so dying at any step
leaves what serves as it was; a round that is killed is taken up again by the next, from its last checkpoint, for as
long as its parent still serves.
"""

import fcntl
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Protocol, get_args

import msgspec
import structlog
from msgspec.structs import replace

from tailrace.errors import BundleError, NothingToLearn, ParityError, Pinned, RoundRunning, TailraceError
from tailrace.events import ModelAnnouncement
from tailrace.ids import ModelVersion
from tailrace.registry import Registry, new_version
from tailrace.rounds import Outcome, RoundLog, RoundRecord
from tailrace.settings import Settings
from training.arrival import fit_arrival, with_arrival
from training.contest import compare
from training.export import export_bundle, load_ranker
from training.fine_tune import FineTuned, Job, fine_tune, learn_alone
from training.gate import decide
from training.graphs import Precision
from training.kinship import require_kinship
from training.log_window import AlreadyRead, LogWindow, Window
from training.record import load_record, save_record
from training.rescoring import BundleScorer
from training.round_state import (
    PLAN_FILE,
    Plan,
    Round,
    end_round,
    facts_of,
    finite_means,
    record_failure,
    split_by_time,
    training_record,
)

log = structlog.get_logger()

STEPS = ("champion", "read", "learn", "export", "evaluate", "decide", "publish", "promote")

_MOST_ATTEMPTS = 3  # at a round that is killed each time

Progress = Callable[[str, int, int], None]  # what is under way, done, in all


class FeedbackLog(Protocol):
    """Where impressions and feedback come from: Kafka, or a simulated world's memory."""

    def plan(self, *, now_ms: int, already: AlreadyRead | None) -> LogWindow:
        """Returns the window that ends now."""

    def read(self, window: LogWindow, progress: Progress) -> Window:
        """Returns the window's examples: the same ones however often it is read."""


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


def run_round(parts: RoundParts) -> RoundRecord:
    """Returns what became of the round, which the registry's rounds and the report say too.

    Raises NothingToLearn where there is too little fresh feedback, RoundRunning where another round runs on this
    machine, Pinned where nothing could be promoted, BundleError where nothing serves yet or another canary is on trial.
    Whatever else goes wrong is recorded as a failed round, and raised.
    """
    settings, training = parts.settings, parts.settings.training
    rounds = settings.path("rounds")
    with _alone(rounds):
        # 1. What serves is what the challenger learns on from, and has to hold its own against.
        parts.on_step("champion")
        pointer = parts.registry.pointer()
        if pointer is None:
            raise BundleError("nothing serves yet: `tailrace models init` makes version 0")
        if pointer.pinned:
            raise Pinned(f"{pointer.champion} is pinned: no challenger could follow it")
        began = parts.now()
        try:
            champion_folder = parts.registry.fetch(pointer.champion, settings.path("cache") / "bundles")
            plan = _unfinished(parts, rounds, pointer.champion) or _plan(
                parts, pointer.champion, pointer.generation, champion_folder
            )
        except (TailraceError, OSError) as error:
            version, reason = new_version(began), f"not begun: {error}"
            record_failure(parts.rounds, version, pointer.champion, reason, began, parts.now())
            raise
        if pointer.canary not in (None, plan.version):
            raise BundleError(f"{pointer.canary} is the canary: a round begins when it has been promoted or taken back")
        this = Round(plan, rounds / plan.version, began)

        def end(outcome: Outcome, reason: str) -> RoundRecord:
            return end_round(this, parts.rounds, training, outcome, reason, parts.now())

        try:
            _keep_plan(this)
            with _timed(this, parts, "read"):
                # 2. The feedback, joined, and how much of it is yet to come; then cut by time, because that is how the
                # model will meet it.
                fresh, replay, this.counts = parts.log.read(plan.window, parts.progress)
                arrival = fit_arrival([*fresh, *replay], plan.window.cutoff_ms)
                fresh, replay = (with_arrival(one, arrival, plan.window.cutoff_ms) for one in (fresh, replay))
                this.replayed, this.split = len(replay), split_by_time(fresh, training)
            with _timed(this, parts, "learn"):
                # 3. Learn, from the serving weights.
                ranker, tokenizer, card = load_ranker(champion_folder)
                champion = parts.open_scorer(champion_folder)
                served = champion if training.workers == 1 else None  # its graphs do not travel to other processes
                this.tuned = parts.learn(
                    partial(
                        fine_tune,
                        ranker,
                        tokenizer,
                        this.split.train,
                        this.split.stop,
                        replay,
                        training,
                        max_user_tokens=card.max_user_tokens,
                        max_item_tokens=card.max_item_tokens,
                        folder=this.folder,
                        facts=facts_of(plan),
                        served=served,
                        progress=parts.progress,
                    )
                )
            if not this.tuned.better:
                return end("rejected", f"nothing was learned: {this.tuned.reason}")
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
                    return end("rejected", f"the export strays: {error}")
            with _timed(this, parts, "evaluate"):
                # 5. Both, as they would serve, on the newest impressions, which neither has learned from.
                this.contest = compare(
                    champion,
                    parts.open_scorer(bundle),
                    this.split.holdout,
                    calibrate_on=this.split.stop,
                    learned=[*replay, *this.split.train, *this.split.stop],
                    settings=settings,
                    progress=parts.progress,
                )
            with _timed(this, parts, "decide"):
                # 6. Decide.
                contest = this.contest
                this.verdict = decide(
                    contest.champion,
                    contest.challenger,
                    contest.latency_ratio,
                    settings.gate,
                    referee_error=contest.referee_error,
                    usual_auc=parts.registry.manifest(plan.parent).metrics.get("auc"),
                    seed=training.seed,
                )
            if not this.verdict.promoted:
                return end("rejected", "; ".join(this.verdict.reasons))
            with _timed(this, parts, "publish"):
                # 7. Publish, the manifest last. From here on the version exists, and serves nobody.
                save_record(training_record(this), bundle)
                figures = finite_means(this.contest.challenger)
                if plan.version not in parts.registry.versions():  # a round killed after this step has published it
                    parts.registry.publish(
                        bundle, version=plan.version, parent=plan.parent, metrics=figures, judged=this.exported.files
                    )
            with _timed(this, parts, "promote"):
                # 8. To a share of the users first, or to all; the pointer must be where it was when the round began.
                # One that a killed round has made the canary only has to be announced again.
                share = settings.gate.canary_share
                expected = pointer.generation if pointer.canary == plan.version else plan.generation
                if share > 0:
                    moved = parts.registry.start_canary(plan.version, share, generation=expected)
                else:
                    moved = parts.registry.promote(plan.version, generation=expected)
                parts.announce(moved)
            _prune(parts.registry, settings.registry.keep)
            return end("canary" if share > 0 else "promoted", "; ".join(this.verdict.reasons))
        except NothingToLearn:
            shutil.rmtree(this.folder, ignore_errors=True)
            raise
        except Exception as error:
            end("failed", str(error) if isinstance(error, TailraceError) else repr(error))
            raise


def _plan(parts: RoundParts, champion: ModelVersion, generation: int, champion_folder: Path) -> Plan:
    record = load_record(champion_folder)
    now = parts.now()
    already = None if record is None else record.already()
    window = parts.log.plan(now_ms=round(now.timestamp() * 1000), already=already)
    return Plan(version=new_version(now), parent=champion, generation=generation, window=window)


def _unfinished(parts: RoundParts, rounds: Path, champion: ModelVersion) -> Plan | None:
    """Returns the plan of a round that was killed, if its parent still serves; other leftovers are removed.

    What kills a round again and again, for want of memory say, is in what it does: then it has failed.
    """
    found: Plan | None = None
    for path in sorted(rounds.glob(f"*/{PLAN_FILE}")):
        try:
            plan = msgspec.json.decode(path.read_bytes(), type=Plan)
        except msgspec.DecodeError:
            plan = None
        if plan is None or plan.parent != champion:
            shutil.rmtree(path.parent)
        elif plan.attempts >= _MOST_ATTEMPTS:
            reason = f"killed {plan.attempts} times, and given up"
            record_failure(parts.rounds, plan.version, plan.parent, reason, parts.now(), parts.now())
            shutil.rmtree(path.parent)
        else:
            found = replace(plan, attempts=plan.attempts + 1)
            path.write_bytes(msgspec.json.encode(found))
            log.info("round taken up again", version=plan.version, attempt=found.attempts)
    return found


def _prune(registry: Registry, keep: int) -> None:
    """Removes old bundles. One that cannot be removed is no failure of a round whose challenger serves by now."""
    try:
        registry.prune(keep)
    except (TailraceError, OSError) as error:
        log.warning("old bundles could not be removed", error=str(error))


def _keep_plan(this: Round) -> None:
    this.folder.mkdir(parents=True, exist_ok=True)
    (this.folder / PLAN_FILE).write_bytes(msgspec.json.encode(this.plan))


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
