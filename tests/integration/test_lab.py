"""Simulated days by the functions that serve and train: the lab in small, and the past that the demo begins with."""

from pathlib import Path

import numpy as np
import pytest
from msgspec.structs import replace

from deploy.demo import load_books
from deploy.history import live_past
from deploy.lab import LabRun, run_lab
from deploy.simulated_days import DAY_MS, Habits
from services.loaded_model import LoadedModel
from tailrace.events import Click, Impression, Rating
from tailrace.features import FEATURE_NAMES, PRIOR_WEIGHTS, decode_features, prior_scores
from tailrace.ids import ModelVersion
from tailrace.registry import Registry
from tailrace.settings import Settings, load_settings
from training.export import build_version_zero

NOW_MS = 1_795_000_000_000
HABITS = Habits(readers=12, readers_new_each_day=2, visits_a_day=40, control_every=2)


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return load_settings(
        None,
        environ={},
        data_dir=str(tmp_path / "data"),
        ranker={"num_candidates": 30, "item_text_cache": False},
        training={"min_examples": 20, "threads": 1, "trackers": []},
    )


def live(
    folder: Path, habits: Habits, settings: Settings, days: int, told: list[str], *, rounds: bool = True
) -> LabRun:
    return run_lab(
        folder,
        load_books(),
        habits,
        settings,
        days=days,
        seed=0,
        progress=lambda step, done, total: None,
        tell=told.append,
        rounds=rounds,
    )


def test_lab_lives_its_days_with_a_round_between_them_and_knows_what_each_arm_was_worth(
    settings: Settings, tmp_path: Path
) -> None:
    told: list[str] = []
    run = live(tmp_path / "lab", HABITS, settings, 2, told)
    assert [day.day for day in run.days] == [0, 1] and len(run.rounds) == 1
    assert run.rounds[0].outcome in ("promoted", "rejected") and run.rounds[0].fresh > 20
    for day in run.days:
        rates = {arm: tally.click_rate for arm, tally in day.arms.items()}
        assert rates["oracle"] > max(rates[arm] for arm in rates if arm != "oracle") > 0
        assert len(day.paired) == HABITS.visits_a_day // HABITS.control_every
    # On the first day version 0 serves, and control is the same version: nothing sets them apart.
    assert run.days[0].version == "v0" and len(told) == 3
    assert all(own == control for _, own, control in run.days[0].paired)


def test_lab_without_rounds_is_the_same_town_under_version_0(settings: Settings, tmp_path: Path) -> None:
    habits = Habits(readers=12, visits_a_day=4)
    alone = live(tmp_path / "alone", habits, settings, 2, [], rounds=False)
    assert [day.version for day in alone.days] == ["v0", "v0"] and alone.rounds == []
    assert alone.days[0].arms == live(tmp_path / "lab", habits, settings, 1, []).days[0].arms


def test_lab_begins_with_version_0_whatever_an_earlier_run_has_left(settings: Settings, tmp_path: Path) -> None:
    folder, habits = tmp_path / "lab", Habits(readers=12, visits_a_day=2)
    first = live(folder, habits, settings, 1, [])
    registry = Registry(str(folder / "registry"))
    registry.export(ModelVersion("v0"), tmp_path / "v0")
    registry.publish(tmp_path / "v0", version=ModelVersion("v9"))
    registry.promote(ModelVersion("v9"))
    again = live(folder, habits, settings, 1, [])
    pointer = registry.pointer()
    assert pointer is not None and pointer.champion == "v0" and registry.versions() == ["v0"]
    assert [day.arms for day in again.days] == [day.arms for day in first.days]


def test_past_ends_now_and_quotes_the_requests_that_it_answers(settings: Settings, tmp_path: Path) -> None:
    version = ModelVersion("v0")
    build_version_zero(
        tmp_path / "v0", version=version, feature_names=FEATURE_NAMES, prior=PRIOR_WEIGHTS, precisions=("int8",)
    )
    model = LoadedModel.load(tmp_path / "v0", version, settings)
    done: list[int] = []
    events = live_past(
        load_books(),
        replace(settings, slate=replace(settings.slate, exploration=0.0)),
        model,
        readers=10,
        visits_a_day=25,
        until_ms=NOW_MS,
        seed=0,
        progress=lambda number, total: done.append(number),
    )
    times = [event.at_ms for _, event in events]
    assert times == sorted(times) and NOW_MS - 2 * DAY_MS <= times[0] < NOW_MS - 1.5 * DAY_MS
    assert NOW_MS - DAY_MS // 2 < times[-1] <= NOW_MS
    assert done == list(range(1, 51))
    shown = {}
    for stream, event in events:
        if isinstance(event, Impression):
            assert (stream, event.degraded, event.model_version) == ("impressions", "none", version)
            scores = [one.score for one in event.shown]
            features_NF = np.stack([decode_features(one.features) for one in event.shown])
            assert scores == pytest.approx(prior_scores(features_NF).tolist(), abs=1e-3)
            shown[event.request_id] = [one.item_id for one in event.shown]
        else:
            assert isinstance(event, Click | Rating) and event.request_id is not None and event.position is not None
            assert shown[event.request_id][event.position] == event.item_id
    assert len(shown) == 50 and len(events) > 60
