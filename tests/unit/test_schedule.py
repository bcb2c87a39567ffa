"""When a round is due."""

import pytest
from click.testing import CliRunner

from tailrace.cli import main
from training.schedule import Schedule, parse_duration


@pytest.mark.parametrize(
    ("schedule", "since_s", "new", "due"),
    [
        (Schedule(every_s=60), 59.9, 10**6, False),
        (Schedule(every_s=60), 60.0, 0, True),
        (Schedule(after_examples=100), 10**6, 99, False),
        (Schedule(after_examples=100), 0.0, 100, True),
        (Schedule(every_s=60, after_examples=100), 10.0, 100, True),
        (Schedule(), 10**9, 10**9, False),
    ],
)
def test_round_is_due_by_time_or_by_impressions(schedule: Schedule, since_s: float, new: int, due: bool) -> None:
    assert schedule.is_due(since_s, new, canary_runs=False) is due


def test_no_round_is_due_while_a_canary_is_on_trial() -> None:
    assert not Schedule(every_s=1).is_due(100.0, 100, canary_runs=True)


@pytest.mark.parametrize(("text", "seconds"), [("30s", 30), ("15m", 900), ("1.5h", 5400), ("2d", 172_800)])
def test_durations_are_read(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "15", "m", "0m", "-1h", "15 minutes"])
def test_other_durations_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="no duration"):
        parse_duration(text)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ([], "say --once"),
        (["--once", "--every", "15m"], "say --once"),
        (["--every", "often"], "'often' is no duration"),
    ],
)
def test_train_says_what_it_needs(options: list[str], says: str) -> None:
    found = CliRunner().invoke(main, ["train", *options])
    assert found.exit_code == 1 and says in found.output
