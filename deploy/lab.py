"""`tailrace lab`: does the loop learn? Simulated days, a training round after each, and the world's own answer.

Every round is the real one (`training.round.run_round`): same join, fine-tune, export, gate and registry. Only the log
is in memory, and a promoted model is loaded without Ray. Clicks are worth what the world expects of them, so arms are
compared without the noise of who happened to click; `control` is version 0 on the same visits, never retrained.
"""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import msgspec
import numpy as np
from msgspec.structs import replace

from deploy.simulated_days import DAY_MS, FIRST_MS, DayFigures, Habits, Log, Town
from deploy.training_parts import open_scorer
from services.loaded_model import LoadedModel
from tailrace.errors import NothingToLearn
from tailrace.events import Click, Rating
from tailrace.features import FEATURE_NAMES, PRIOR_WEIGHTS
from tailrace.ids import ModelVersion
from tailrace.items import Item
from tailrace.registry import Registry, open_registry
from tailrace.rounds import RoundRecord, open_round_log
from tailrace.settings import Settings
from training.export import build_version_zero
from training.log_window import AlreadyRead, Chunk, LogWindow, Window, read_partition
from training.reservoir import Selection
from training.round import RoundParts, run_round
from training.slate_metrics import resample_sums

Progress = Callable[[str, int, int], None]

_FIRST = ModelVersion("v0")


@dataclass(frozen=True)
class LabRun:
    """One seed's days and the rounds between them."""

    seed: int
    days: list[DayFigures]
    rounds: list[RoundRecord] = field(default_factory=list)

    def against_control(self, day: DayFigures, resamples: int = 1000) -> tuple[float, float, float]:
        """Returns how much more the day's slates were worth than control's, as a share, with a 95 % interval.

        Of the visits on which both ranked. The interval draws readers, not visits: one's slates hang together.
        """
        users, own, control = zip(*day.paired, strict=True)
        _, reader_V = np.unique(users, return_inverse=True)
        by_reader = [np.bincount(reader_V, weights=worth) for worth in (own, control)]
        worth_U2 = np.stack(by_reader, axis=1).astype(np.float64)
        sums_R2 = resample_sums(worth_U2, resamples=resamples, seed=self.seed * 1000 + day.day)
        low, high = np.percentile(sums_R2[:, 0] / sums_R2[:, 1] - 1, [2.5, 97.5])
        return sum(own) / sum(control) - 1, float(low), float(high)


class MemoryLog:
    """A town's log as `training.round.FeedbackLog`: read by the same functions that read Kafka."""

    def __init__(self, log: Log, settings: Settings) -> None:
        self._log = log
        self._settings = settings

    def plan(self, *, now_ms: int, already: AlreadyRead | None) -> LogWindow:
        """Returns the window that ends now."""
        since_ms = now_ms - round(self._settings.training.window_s * 1000)
        return LogWindow(since_ms=since_ms, cutoff_ms=now_ms, already=already, offsets={})

    def read(self, window: LogWindow, progress: Progress) -> Window:
        """Returns the window's examples."""
        training, log = self._settings.training, self._log
        selection = Selection(
            max_fresh=training.max_examples,
            max_replay=training.replay_examples,
            half_life_ms=training.replay_half_life_s * 1000,
            seed=training.seed,
        )
        impressions = [one for one in log.impressions if window.since_ms <= one.at_ms < window.cutoff_ms]
        given: list[Click | Rating] = [*log.clicks, *log.ratings]
        feedback = [one for one in given if window.since_ms <= one.at_ms < window.cutoff_ms]
        counts = read_partition(
            0,
            [Chunk(clicks=feedback)],
            [Chunk(impressions=impressions, logged_ms={one.request_id: one.at_ms for one in impressions})],
            selection,
            window,
            training,
        )
        progress("read", len(impressions), len(impressions))
        return Window(selection.fresh, selection.replay, counts)


def run_lab(
    folder: Path,
    items: Sequence[Item],
    habits: Habits,
    settings: Settings,
    *,
    days: int,
    seed: int,
    progress: Progress,
    tell: Callable[[str], None],
    rounds: bool = True,
) -> LabRun:
    """Returns what `days` simulated days came to, with a round after each but the last.

    Without `rounds` version 0 serves all the time: the same town, had nobody learned. `control` tells less: it ranks
    what readers of the newer version have left, who have read what that put first. `folder` is emptied first: a
    champion of an earlier run has learned this very world.
    """
    shutil.rmtree(folder, ignore_errors=True)
    settings = replace(
        settings,
        data_dir=str(folder),
        registry=replace(settings.registry, url="registry"),
        gate=replace(settings.gate, canary_share=0.0),  # a day here is too short to watch a canary
        # Nobody in this world cares for variety, so every arm is free of it. Exploration stays: learning needs it.
        slate=replace(settings.slate, diversity=0.0, max_per_tag=0),
        training=replace(settings.training, seed=seed),
    )
    # 1. Version 0, which is also the control.
    registry = open_registry(settings)
    _publish_first(registry, folder / "v0", settings, progress)
    town = Town(items, habits, settings, seed)
    now_ms = FIRST_MS
    control = LoadedModel.load(registry.fetch(_FIRST, folder), _FIRST, settings)
    model = LoadedModel.load(registry.fetch(_FIRST, folder), _FIRST, settings)
    run = LabRun(seed, [])
    for day in range(days):
        # 2. A day on what serves.
        run.days.append(town.live(day, model, control, partial(progress, f"day {day + 1}")))
        tell(describe_day(run, run.days[-1]))
        if day == days - 1 or not rounds:
            continue
        # 3. A round on what the day has shown.
        now_ms = FIRST_MS + (day + 1) * DAY_MS
        parts = RoundParts(
            settings=settings,
            registry=registry,
            rounds=open_round_log(settings),
            log=MemoryLog(town.log, settings),
            open_scorer=open_scorer(settings),
            announce=lambda announcement: None,
            now=partial(datetime.fromtimestamp, now_ms / 1000, UTC),
            progress=progress,
        )
        try:
            record = run_round(parts)
        except NothingToLearn as error:
            tell(f"no round: {error}")
            continue
        run.rounds.append(record)
        tell(f"round {record.version}: {record.outcome}; {record.reason} ({sum(record.took_s.values()):.0f} s)")
        # 4. What was promoted serves from the next morning.
        pointer = registry.pointer()
        assert pointer is not None
        if pointer.champion != model.version:
            model.retire()
            model = LoadedModel.load(registry.fetch(pointer.champion, folder), pointer.champion, settings)
    return run


def describe_day(run: LabRun, day: DayFigures) -> str:
    """Returns one line about a day."""
    rates = ", ".join(f"{arm} {100 * tally.click_rate:.2f} %" for arm, tally in day.arms.items())
    gain, low, high = run.against_control(day)
    return (
        f"day {day.day + 1} on {day.version}: {rates}; {100 * day.lift_share():.0f} % of the lift that could be "
        f"known, {100 * day.lift_share('oracle'):.0f} % of the oracle's; "
        f"{100 * gain:+.1f} % against control [{100 * low:+.1f}, {100 * high:+.1f}]"
    )


def summarise(runs: Sequence[LabRun]) -> bytes:
    """Returns the runs as JSON: click rates by arm, share of the attainable lift, gain over control, rounds."""
    found = [
        {
            "seed": run.seed,
            "days": [
                {
                    "day": day.day + 1,
                    "version": day.version,
                    "click_rates": {arm: tally.click_rate for arm, tally in day.arms.items()},
                    "expected_clicks": {arm: tally.expected_clicks for arm, tally in day.arms.items()},
                    "lift_share": day.lift_share(),
                    "lift_share_of_oracle": day.lift_share("oracle"),
                    "against_control": run.against_control(day),
                    "clicks": day.clicks,
                }
                for day in run.days
            ],
            "rounds": run.rounds,
        }
        for run in runs
    ]
    return msgspec.json.format(msgspec.json.encode(found), indent=2)


def _publish_first(registry: Registry, folder: Path, settings: Settings, progress: Progress) -> None:
    build_version_zero(
        folder,
        version=_FIRST,
        feature_names=FEATURE_NAMES,
        prior=PRIOR_WEIGHTS,
        precisions=(settings.ranker.served_precision,),
        progress=progress,
    )
    registry.publish(folder, version=_FIRST)
    registry.promote(_FIRST)
