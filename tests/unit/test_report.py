"""A round's report: every figure given stands in it, and no text of an item becomes markup."""

import base64
import re
from dataclasses import replace
from html.parser import HTMLParser
from math import nan
from pathlib import Path

import numpy as np
import pytest

from tailrace.settings import GateSettings
from tests.made_up_slates import make_examples
from training.evaluate import evaluate
from training.gate import decide
from training.item_moves import ItemMove, item_moves
from training.judged_gains import Referee, judged_gains
from training.off_policy import OffPolicy
from training.popularity import count_popularity
from training.ranking_metrics import Interval
from training.report import FIGURES, RoundFacts, write_report
from training.round_state import finite_means

NASTY = "<script>alert('1')</script> | *bold* & [link](javascript:x) <img src=x onerror=y>\n# heading"


@pytest.fixture(scope="module")
def facts() -> RoundFacts:
    examples, worths = make_examples(80)
    rng = np.random.default_rng(4)
    before = [worth + 3 * rng.normal(size=len(worth)) for worth in worths]
    popularity = count_popularity(examples[:40])
    gains = judged_gains(examples, before, worths, Referee(0.1, 0.1, -1.1), np.ones(8))
    champion = evaluate(examples, before, popularity=popularity, gains=gains, bootstrap=50)
    challenger = evaluate(examples, worths, popularity=popularity, gains=gains, bootstrap=50)
    return RoundFacts(
        version="v8",
        parent="v7",
        began_at="2026-11-24T02:00:00Z",
        ended="promoted: it was better",
        read={"impressions": 12_345, "late labels": 67, "window": "7 days", "share with a click": 0.31234},
        history=[
            {"train loss": 2.5, "stop loss": 2.4, "stop NDCG@10": 0.41},
            {"train loss": 2.2, "stop loss": None, "stop NDCG@10": 0.44},
        ],
        judged=(champion, challenger),
        verdict=decide(champion, challenger, 1.07, GateSettings()),
        took_s={"read": 3.21, "fine-tune": 45.6},
        moves=[ItemMove(NASTY, 1_200, 7.25, 2.5), *item_moves(examples, before, worths, most=3)],
        unexplored=OffPolicy(
            logged=Interval(0.0911, 0.0871, 0.0951),
            ips=Interval(0.0942, 0.0882, 0.1002),
            snips=Interval(0.0943, 0.0883, 0.1003),
            doubly_robust=Interval(0.0944, 0.0884, 0.1004),
            gain=Interval(0.0033, 0.0029, 0.0037),
            slates=2_345,
            effective_slates=1_404.3,
            mean_weight=1.01,
        ),
        notes=["Nothing else of note."],
    )


@pytest.fixture(scope="module")
def pages(facts: RoundFacts, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_report(tmp_path_factory.mktemp("report") / "round", facts)


class Reader(HTMLParser):
    """The tags and the text of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data + "\n"


def test_every_figure_given_stands_in_both_pages(facts: RoundFacts, pages: tuple[Path, Path]) -> None:
    markdown = pages[0].read_text().replace("\\", "")
    text = Reader(pages[1].read_text()).text
    expected = ["12,345", "67", "7 days", "0.3123", "2026-11-24T02:00:00Z", "3.2", "45.6", "v7", "v8", "1,200", "7.2"]
    expected += ["2,345", "1,404", "0.0911", "0.0942", "0.0943", "0.0944 (0.0884 to 0.1004)", "0.0033 (0.0029 to"]
    assert facts.verdict is not None and facts.judged is not None
    expected += ["Nothing else of note.", "promoted: it was better", *[check.text for check in facts.verdict.checks]]
    for model in facts.judged:
        for name in FIGURES.keys() & model.figures.keys():
            found = model.figures[name]
            expected.append(f"{found.mean:.4f} ({found.low:.4f} to {found.high:.4f})")
        expected += [f"{one.figures['ndcg_10'].mean:.4f}" for one in model.slices.values()]
    expected += [FIGURES[name][0] for name in FIGURES.keys() & facts.judged[0].figures.keys()]
    for what in expected:
        assert what in text, what
        assert what in markdown or what in markdown.replace("&amp;", "&"), what


def test_every_figure_of_an_evaluation_has_its_row(facts: RoundFacts) -> None:
    assert facts.judged is not None
    assert set(facts.judged[0].figures) - {"click_rate"} == set(FIGURES) - {"diversity"}


def test_html_is_one_file_with_its_plots_inside(pages: tuple[Path, Path]) -> None:
    tags = Reader(pages[1].read_text()).tags
    sources = [attributes["src"] or "" for tag, attributes in tags if tag == "img"]
    assert len(sources) == 3
    for source in sources:
        assert base64.b64decode(source.removeprefix("data:image/png;base64,")).startswith(b"\x89PNG")
    assert not {tag for tag, _ in tags} & {"script", "link", "iframe"}


def test_markdown_shows_the_plots_that_lie_beside_it(pages: tuple[Path, Path]) -> None:
    names = re.findall(r"!\[[^\]]*\]\(([^)]*)\)", pages[0].read_text())
    assert names == ["loss.png", "reliability.png", "slices.png"]
    assert all((pages[0].parent / name).read_bytes().startswith(b"\x89PNG") for name in names)


def test_text_of_an_item_never_becomes_markup(pages: tuple[Path, Path]) -> None:
    reader = Reader(pages[1].read_text())
    assert NASTY in reader.text
    assert not any("onerror" in attributes or "href" in attributes for _, attributes in reader.tags)
    row = next(line for line in pages[0].read_text().splitlines() if "alert" in line)
    assert "<" not in row and len(re.findall(r"(?<!\\)\|", row)) == 5
    assert r"\*bold\*" in row and r"\[link\]" in row


def test_no_users_text_stands_in_a_report(pages: tuple[Path, Path]) -> None:
    assert not any("likes number" in page.read_text() for page in pages)


def test_what_a_log_cannot_tell_of_exploration_is_said(facts: RoundFacts, tmp_path: Path) -> None:
    markdown, _ = write_report(tmp_path, replace(facts, unexplored="90 logged slates are worth 60 of the target's"))
    assert "It cannot be told: 90 logged slates" in markdown.read_text()


def test_a_refusal_says_which_check_failed(facts: RoundFacts, tmp_path: Path) -> None:
    assert facts.judged is not None
    verdict = decide(*reversed(facts.judged), float("nan"), GateSettings())
    ended = f"rejected: {'; '.join(verdict.reasons)}"
    markdown, _ = write_report(tmp_path, replace(facts, ended=ended, verdict=verdict, history=[], moves=(), notes=()))
    text = markdown.read_text().replace("\\", "")
    assert "rejected: NDCG@10" in text and "time to score" in text and "| FAILED | latency |" in text
    assert "loss.png" not in text and "Notes" not in text


def test_a_round_that_ended_early_reports_what_there_is(facts: RoundFacts, tmp_path: Path) -> None:
    ended = "rejected: nothing beats the parent"
    pages = write_report(tmp_path, RoundFacts("v8", "v7", facts.began_at, ended, facts.read, facts.history))
    for page in pages:
        text = page.read_text()
        assert ended in text and "before the gate" in text and "12,345" in text and "loss" in text
        assert "Calibration" not in text
    bare = write_report(tmp_path, RoundFacts("v8", "v7", facts.began_at, "failed: no broker"))[0].read_text()
    assert "failed: no broker" in bare


def test_items_that_moved_most_come_first_with_their_mean_places() -> None:
    examples, worths = make_examples(4, shown=3, unshown=0, catalogue=3)
    first = examples[0].texts[0]
    before = [np.array([float(text != first) for text in one.texts]) for one in examples]
    after = [1 - scores for scores in before]
    assert item_moves(examples, before, after)[0] == ItemMove(first, 4, 3.0, 1.0)
    unmoved = item_moves(examples, worths, worths)
    assert all(move.champion_place == move.challenger_place for move in unmoved)


def test_figures_that_no_slate_could_tell_are_left_out_of_records(facts: RoundFacts) -> None:
    assert facts.judged is not None
    silent = replace(facts.judged[0], figures={"auc": Interval(nan, nan, nan), "click_rate": Interval(0.1, 0.1, 0.1)})
    assert finite_means(silent) == {"click_rate": 0.1}
