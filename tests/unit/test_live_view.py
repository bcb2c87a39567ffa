"""What a person is told of the demo: clicks, and what slates were worth, by arm, version and time."""

import time

import pytest
from rich.console import Console

from deploy.live_view import facts, print_summary
from deploy.readers import STRETCH_S, Tally


def count(tally: Tally, arm: str, version: str | None, *, clicked: int, expected: float, attainable: float) -> None:
    """One slate of eight."""
    for worth in tally.where(arm, version):
        worth.shown += 8
        worth.clicked += clicked
        worth.expected += expected
        worth.attainable += attainable


@pytest.fixture
def tally() -> Tally:
    made = Tally()
    count(made, "personalised", "v0", clicked=1, expected=0.4, attainable=1.6)
    count(made, "random", None, clicked=0, expected=0.1, attainable=1.0)
    made.started = time.monotonic() - 1.5 * STRETCH_S
    count(made, "personalised", "v1", clicked=2, expected=0.8, attainable=1.6)
    return made


def test_slates_count_by_arm_by_version_and_by_the_time_they_were_shown(tally: Tally) -> None:
    told = dict(facts(tally, lag=3, ceiling=0.2))
    assert told["click rate, personalised"] == "18.75 %  (3 of 16)"
    assert told["click rate, popular"] == "0.00 %  (0 of 0)"
    assert told["· by model v0"] == "12.50 %  (1 of 8), 5.00 % expected: 25 % of the best"
    assert told["· by model v1"] == "25.00 %  (2 of 8), 10.00 % expected: 50 % of the best"
    assert list(tally.by_version) == ["v0", "v1"]
    assert {stretch: round(worth.attained, 6) for stretch, worth in tally.by_stretch.items()} == {0: 0.25, 1: 0.5}


def test_summary_shows_how_slates_did_as_time_went_by(tally: Tally) -> None:
    console = Console(record=True, width=120, force_terminal=False)
    print_summary(console, tally, 0, 0.2)
    lines = console.export_text().splitlines()
    assert any("0 s" in line and "12.50 %" in line and "25 %" in line for line in lines)
    assert any(f"{STRETCH_S} s" in line and "25.00 %" in line and "50 %" in line for line in lines)
