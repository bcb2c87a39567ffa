"""Offline evaluation on tiny synthetic folders in the public formats, whose truth is known."""

import json
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import torch
from click.testing import CliRunner

from deploy.prequential import LAMBDARANK, RETRAINED, SERVED, VERSION_ZERO, Outcome, Plan, run_prequential
from tailrace.cli import main
from tailrace.importers import IMPORTERS, Reading
from tailrace.settings import Settings

torch.set_num_threads(1)

BEGIN_S = 1_460_000_000
HOUR_S = 3600
WORDS = ("harbour", "lantern", "garden", "engine", "market", "violin", "desert", "recipe")
RULES_ALONE = Plan(round_every=0, rank_from=0.5)


@dataclass(frozen=True)
class Touch:
    at_s: int
    user: str
    item: int


def newest_readers(*, items: int, seed: int = 0) -> list[Touch]:
    """Returns a site where an item comes out every hour, and whoever comes by takes the newest they have not had."""
    rng = np.random.default_rng(seed)
    had: dict[str, set[int]] = {}
    touches = []
    for item in range(items):
        out_s = BEGIN_S + item * HOUR_S
        touches.append(Touch(out_s, "editor", item))
        for visit in range(4):
            user = f"u{rng.integers(12)}"
            left = [one for one in range(item + 1) if one not in had.setdefault(user, set())]
            if left:
                had[user].add(left[-1])
                touches.append(Touch(out_s + 60 + 800 * visit + int(rng.integers(700)), user, left[-1]))
    return touches


def write_deskdrop(folder: Path, touches: list[Touch]) -> Path:
    folder.mkdir(parents=True)
    header = "timestamp,eventType,contentId,personId,sessionId,userAgent,userRegion,userCountry\n"
    lines = [f"{one.at_s},VIEW,i{one.item},{one.user},s{one.user},,,\n" for one in touches]
    (folder / "users_interactions.csv").write_text(header + "".join(lines))
    titles = [f"i{item},{WORDS[item % 8]} {WORDS[item // 8 % 8]} {item}\n" for item in {one.item for one in touches}]
    (folder / "titles.csv").write_text("contentId,title\n" + "".join(titles))
    return folder


def quick(**changes: float) -> Settings:
    """Returns settings under which a round takes seconds."""
    training = msgspec.structs.replace(Settings().training, epochs=2, threads=1, **changes)
    return msgspec.structs.replace(Settings(), training=training)


def replay(folder: Path, scratch: Path, plan: Plan) -> Outcome:
    return run_prequential(IMPORTERS["deskdrop"](folder, Reading()), quick(), plan, scratch)


def ndcg(outcome: Outcome, ranking: str) -> float:
    ranks = np.array([one.ranks[ranking] for one in outcome.ranked])
    return float(np.where(ranks <= 10, 1 / np.log2(ranks + 1), 0).mean())


def test_newest_first_wins_where_everybody_takes_the_newest(tmp_path: Path) -> None:
    folder = write_deskdrop(tmp_path / "data", newest_readers(items=60))
    outcome = replay(folder, tmp_path / "scratch", RULES_ALONE)
    assert len(outcome.ranked) > 80
    assert {one.ranks["newest first"] for one in outcome.ranked} == {1.0}
    assert ndcg(outcome, "newest first") > ndcg(outcome, VERSION_ZERO) > ndcg(outcome, "random")
    assert ndcg(outcome, "newest first") > ndcg(outcome, "all-time popularity")


def test_what_is_ranked_is_first_touches_among_all_that_was_seen_and_not_touched(tmp_path: Path) -> None:
    """By hand: b meets x (due), again (a repeat), then y (due, x being touched); z comes out (its first event)."""
    begin = [Touch(BEGIN_S + number, "a", item) for number, item in enumerate((0, 1, 2, 3))]
    later = [Touch(BEGIN_S + 10, "b", 0), Touch(BEGIN_S + 11, "b", 0), Touch(BEGIN_S + 12, "b", 1)]
    folder = write_deskdrop(tmp_path / "data", [*begin, *later, Touch(BEGIN_S + 13, "b", 4)])
    outcome = replay(folder, tmp_path / "scratch", RULES_ALONE)
    assert [(one.at_ms - BEGIN_S * 1000, one.num_candidates) for one in outcome.ranked] == [(10_000, 4), (12_000, 3)]
    assert [one.ranks["newest first"] for one in outcome.ranked] == [4.0, 3.0]
    assert [one.ranks["all-time popularity"] for one in outcome.ranked] == [2.5, 2.0]


def test_future_rows_never_change_earlier_ranks(tmp_path: Path) -> None:
    touches = newest_readers(items=50)
    cut = len(touches) * 9 // 10
    rng = np.random.default_rng(9)
    others = [Touch(one.at_s, f"u{rng.integers(12)}", int(rng.integers(one.item + 1))) for one in touches[cut:]]
    # As many rows as before, so that the parts of the stream stay where they are; training included.
    plan = Plan(rank_from=0.7, learn_from=0.1, round_every=30, num_hard=10, num_random=5)
    as_it_was = replay(write_deskdrop(tmp_path / "a", touches), tmp_path / "scratch_a", plan)
    changed = replay(write_deskdrop(tmp_path / "b", touches[:cut] + others), tmp_path / "scratch_b", plan)
    cut_ms = touches[cut].at_s * 1000
    before = [[one for one in outcome.ranked if one.at_ms < cut_ms] for outcome in (as_it_was, changed)]
    assert sum(one.at_ms < cut_ms for one in as_it_was.rounds) == 2
    assert len(before[0]) > 30
    assert before[0] == before[1]
    assert as_it_was.ranked[len(before[0]) :] != changed.ranked[len(before[0]) :]


def test_what_learns_as_the_stream_goes_beats_what_is_frozen(tmp_path: Path) -> None:
    folder = write_deskdrop(tmp_path / "data", newest_readers(items=100))
    plan = Plan(rank_from=0.5, learn_from=0.1, round_every=1000, num_hard=20, num_random=10)
    outcome = replay(folder, tmp_path / "scratch", plan)
    assert [(one.version, one.better) for one in outcome.rounds] == [("v1", True)]
    assert ndcg(outcome, RETRAINED) > ndcg(outcome, VERSION_ZERO) + 0.05
    assert ndcg(outcome, LAMBDARANK) > ndcg(outcome, VERSION_ZERO)
    assert all(one.ranks[SERVED] <= one.ranks[RETRAINED] for one in outcome.ranked if np.isfinite(one.ranks[SERVED]))


def test_the_command_writes_a_table_json_and_plots(tmp_path: Path) -> None:
    folder = write_deskdrop(tmp_path / "data", newest_readers(items=40))
    command = ["evaluate", "deskdrop", str(folder), "--protocol", "prequential", "--round-every", "0"]
    done = CliRunner().invoke(main, [*command, "--every", "2", "--limit", "20", "--out", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    assert "newest first" in done.output
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert found["facts"]["ranked events"] == 20
    newest = next(one for one in found["figures"] if one["ranking"] == "newest first")
    assert newest["metrics"]["NDCG@10"] == {"mean": 1.0, "low": 1.0, "high": 1.0}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "results.json",
        "figures.png",
        "ndcg_over_time.png",
    }


def write_mind(folder: Path, *, days: int, slates: int, seed: int = 0) -> Path:
    """Writes news of eight topics, and users who click, in every slate, the one item of the topic of their history."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    news = [f"N{number}\tnews\t{WORDS[number % 8]}\tabout the {WORDS[number % 8]} {number}" for number in range(160)]
    (folder / "news.tsv").write_text("".join(f"{line}\tall of it\turl\t[]\t[]\n" for line in news))
    lines = []
    for number in range(days * slates):
        day, topic = number // slates, int(rng.integers(8))
        history = " ".join(f"N{topic + 8 * int(one)}" for one in rng.integers(10, size=3))
        shown = [f"N{other + 8 * int(rng.integers(10, 20))}-{int(other == topic)}" for other in rng.permutation(8)]
        stamp = f"11/{9 + day}/2019 {1 + number % 11}:{number % 60:02d}:00 AM"
        lines.append(f"{number}\tU{number}\t{stamp}\t{history}\t{' '.join(shown)} X{number}-0\n")
    (folder / "behaviors.tsv").write_text("".join(lines))
    return folder


def test_mind_slates_are_learned_before_the_last_day_and_ranked_on_it(tmp_path: Path) -> None:
    folder = write_mind(tmp_path / "data", days=3, slates=30)
    command = ["evaluate", "mind", str(folder), "--protocol", "slates", "--out", str(tmp_path / "out"), "--json"]
    done = CliRunner().invoke(main, command, env={"TAILRACE_TRAINING__EPOCHS": "2", "TAILRACE_TRAINING__THREADS": "1"})
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert (found["facts"]["slates learned from"], found["facts"]["slates ranked"]) == (60, 30)
    assert found["facts"]["mean items of a ranked slate"] == 8  # the ninth has no text
    auc = {one["ranking"]: one["metrics"]["AUC"]["mean"] for one in found["figures"]}
    assert len(auc) == 10
    assert auc["TF-IDF cosine"] == 1.0
    assert auc["cosine to the mean of the last clicks, untrained"] > 0.9


def test_a_folder_with_one_day_is_refused(tmp_path: Path) -> None:
    folder = write_mind(tmp_path / "data", days=1, slates=20)
    done = CliRunner().invoke(main, ["evaluate", "mind", str(folder), "--out", str(tmp_path / "out")])
    assert done.exit_code == 1
    assert "0 usable slates before the last day" in done.output
