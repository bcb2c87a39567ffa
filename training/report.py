"""One round as a page to read: what went in, how it learned, both models side by side, and why it was decided so.

`report.md` with its plots beside it, and `report.html` in one file. No user's text is shown: a report outlives an
erasure, a log does not.
"""

import base64
import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from training.evaluate import CONFIDENCE, Evaluation
from training.gate import Verdict
from training.item_moves import ItemMove
from training.off_policy import OffPolicy
from training.ranking_metrics import Interval
from training.report_plots import plot_intervals, plot_losses, plot_reliability

# Name in an evaluation: what a reader calls it, and which way is better, +1 or -1; 0 where neither is.
FIGURES: Mapping[str, tuple[str, int]] = {
    "ndcg_10": ("NDCG@10", 1),
    "ndcg_10_judged": ("NDCG@10, as the gate judges", 1),
    "mrr": ("MRR", 1),
    "hit_3": ("HR@3", 1),
    "hit_10": ("HR@10", 1),
    "auc": ("AUC within slates", 1),
    "precision_3": ("precision@3", 1),
    "recall_3": ("recall@3", 1),
    "f1_3": ("F1@3", 1),
    "log_loss": ("log loss", -1),
    "calibration_error": ("calibration error", -1),
    "coverage": ("item coverage of the first 3", 0),
    "novelty": ("novelty of the first 3, bits", 0),
    "diversity": ("diversity of the first 3", 0),
}
SLICE_SHOWN = "ndcg_10"

CAVEAT = (
    "Only shown items have labels, and the champion chose them: rank figures are over the shown items of a slate, "
    "but for what the gate judges by: there, what was not shown counts with what is to be expected of it. "
    "Coverage, novelty and diversity are of the three that would stand first among the shown and the logged sample of "
    "those not shown. NDCG, MRR, HR, precision, recall and F1 leave out slates that cannot tell. "
    f"Intervals are {CONFIDENCE:.0%}, by bootstrap over the examples; that of the calibration error leans up, since "
    "noise can only add to it. Better or worse is said only where the two intervals are apart."
)

_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}"
    "table{border-collapse:collapse;margin:1rem 0}td,th{border:1px solid #ccc;padding:.25rem .6rem;text-align:left}"
    "th{background:#f3f3f3}img{max-width:100%}@media(prefers-color-scheme:dark){body{background:#161616;color:#ddd}"
    "th{background:#2a2a2a}td,th{border-color:#444}img{background:#fff}}"
)


@dataclass(frozen=True)
class RoundFacts:
    """All that a report says, of which a round that ended early has less. `ended` says how and why.

    `history` is figures by epoch; `read` and `took_s` are shown as they are, in order; `judged` are champion and
    challenger; `unexplored` is the log's click rate as it would be without exploration, or why nobody can tell.
    """

    version: str
    parent: str
    began_at: str
    ended: str
    read: Mapping[str, int | float | str] = field(default_factory=dict)
    history: Sequence[Mapping[str, float | None]] = ()
    judged: tuple[Evaluation, Evaluation] | None = None
    verdict: Verdict | None = None
    took_s: Mapping[str, float] = field(default_factory=dict)
    moves: Sequence[ItemMove] = ()
    unexplored: OffPolicy | str = ""
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class _Table:
    heads: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class _Plot:
    name: str
    says: str
    png: bytes


_Block = str | _Table | _Plot


def write_report(folder: Path, facts: RoundFacts) -> tuple[Path, Path]:
    """Writes report.md with its plots and report.html into `folder`, and returns the paths of the two."""
    folder.mkdir(parents=True, exist_ok=True)
    title = f"Training round: {facts.version}, from {facts.parent}"
    sections = _sections(facts)
    for block in (block for _, blocks in sections for block in blocks if isinstance(block, _Plot)):
        (folder / f"{block.name}.png").write_bytes(block.png)
    pages = (folder / "report.md", folder / "report.html")
    pages[0].write_text(_markdown(title, sections), encoding="utf-8")
    pages[1].write_text(_html(title, sections), encoding="utf-8")
    return pages


def _sections(facts: RoundFacts) -> list[tuple[str, list[_Block]]]:
    sections: list[tuple[str, list[_Block]]] = [("Verdict", [facts.ended, *_verdict_blocks(facts.verdict)])]
    read: list[_Block] = [f"Began at {facts.began_at}."]
    if facts.read:
        read.append(_Table(("read", ""), [(name, _number(value)) for name, value in facts.read.items()]))
    sections.append(("What was read", read))
    if facts.history:
        sections.append(("Learning", [_Plot("loss", "losses by epoch", plot_losses(facts.history))]))
    if facts.judged is not None:
        champion, challenger = facts.judged
        count, tell = challenger.examples, challenger.ranked
        held = f"Both models are judged on {count:,} unseen impressions, of which {tell:,} tell."
        sections.append(("Champion and challenger", [held, _metrics_table(champion, challenger), CAVEAT]))
        sections.append(("Calibration", _calibration_blocks(champion, challenger)))
        if challenger.slices:
            sections.append(("Slices", _slice_blocks(champion, challenger)))
    if facts.moves:
        heads = ("item", "times", "champion's place", "challenger's place")
        rows = [(m.text, f"{m.times:,}", f"{m.champion_place:.1f}", f"{m.challenger_place:.1f}") for m in facts.moves]
        sections.append(("Items that moved most", [_Table(heads, rows)]))
    if facts.unexplored:
        sections.append(("What exploration costs", _exploration_blocks(facts.unexplored)))
    took = _Table(("stage", "seconds"), [(stage, f"{seconds:.1f}") for stage, seconds in facts.took_s.items()])
    sections.append(("Time", [took]))
    if facts.notes:
        sections.append(("Notes", list(facts.notes)))
    return sections


def _verdict_blocks(verdict: Verdict | None) -> list[_Block]:
    if verdict is None:
        return ["It ended before the gate."]
    rows = [("passed" if check.passed else "FAILED", check.name, check.text) for check in verdict.checks]
    return [_Table(("", "check", "found"), rows)]


def _metrics_table(champion: Evaluation, challenger: Evaluation) -> _Table:
    rows = []
    for name, (label, better) in FIGURES.items():
        usual, own = champion.figures.get(name), challenger.figures.get(name)
        if usual is not None and own is not None:
            change = own.mean - usual.mean
            apart = own.low > usual.high or own.high < usual.low
            sign = ("better" if change * better > 0 else "worse") if better and apart else ""
            rows.append((label, _interval(usual), _interval(own), f"{change:+.4f}", sign))
    return _Table(("figure", "champion", "challenger", "change", ""), rows)


def _calibration_blocks(champion: Evaluation, challenger: Evaluation) -> list[_Block]:
    scalings = [f"{one.platt.slope:.3f} · score {one.platt.intercept:+.3f}" for one in (champion, challenger)]
    text = f"Logit of a click, fitted on earlier impressions: champion {scalings[0]}, challenger {scalings[1]}."
    return [text, _Plot("reliability", "reliability diagram", plot_reliability(champion, challenger))]


def _slice_blocks(champion: Evaluation, challenger: Evaluation) -> list[_Block]:
    both = {name: (champion.slices[name], own) for name, own in challenger.slices.items() if name in champion.slices}
    label = FIGURES[SLICE_SHOWN][0]
    rows = [
        (name, f"{own.examples:,}", _interval(usual.figures[SLICE_SHOWN]), _interval(own.figures[SLICE_SHOWN]))
        for name, (usual, own) in both.items()
    ]
    shown = {name: (usual.figures[SLICE_SHOWN], own.figures[SLICE_SHOWN]) for name, (usual, own) in both.items()}
    plot = _Plot("slices", f"{label} by slice", plot_intervals(label, shown))
    return [_Table(("slice", "impressions", f"champion {label}", f"challenger {label}"), rows), plot]


def _exploration_blocks(found: OffPolicy | str) -> list[_Block]:
    if isinstance(found, str):
        return [f"It cannot be told: {found}."]
    text = (
        f"Of {found.slates:,} fresh impressions, by their logged propensities: they are worth "
        f"{found.effective_slates:,.0f} of a policy that does not explore. Clicks yet to arrive are in no figure, nor "
        "is what exploring teaches. Intervals are 95%, and take slates as independent."
    )
    names = (
        ("as logged", found.logged),
        ("without exploration, IPS", found.ips),
        ("without exploration, SNIPS", found.snips),
        ("without exploration, doubly robust", found.doubly_robust),
        ("what is lost by exploring, doubly robust", found.gain),
    )
    return [text, _Table(("clicks per item shown", ""), [(name, _interval(one)) for name, one in names])]


def _interval(found: Interval) -> str:
    if not np.isfinite(found.mean):
        return "–"
    return f"{found.mean:.4f} ({found.low:.4f} to {found.high:.4f})"


def _number(value: int | float | str) -> str:
    return value if isinstance(value, str) else f"{value:,}" if isinstance(value, int) else f"{value:,.4g}"


def _markdown(title: str, sections: Sequence[tuple[str, Sequence[_Block]]]) -> str:
    lines = [f"# {_plain(title)}", ""]
    for name, blocks in sections:
        lines += [f"## {name}", ""]
        for block in blocks:
            if isinstance(block, _Table):
                lines += ["| " + " | ".join(map(_plain, block.heads)) + " |", "|---" * len(block.heads) + "|"]
                lines += ["| " + " | ".join(map(_plain, row)) + " |" for row in block.rows]
            elif isinstance(block, _Plot):
                lines.append(f"![{block.says}]({block.name}.png)")
            else:
                lines.append(_plain(block))
            lines.append("")
    return "\n".join(lines)


def _plain(text: str) -> str:
    """Returns text that Markdown shows as it is, on one line: neither markup nor HTML."""
    one_line = html.escape(" ".join(text.split()), quote=False)
    return "".join(f"\\{letter}" if letter in "\\`*_[]|~#" else letter for letter in one_line)


def _html(title: str, sections: Sequence[tuple[str, Sequence[_Block]]]) -> str:
    parts = [
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>',
        f"<style>{_STYLE}</style></head><body><h1>{html.escape(title)}</h1>",
    ]
    for name, blocks in sections:
        parts.append(f"<h2>{html.escape(name)}</h2>")
        parts += [_html_block(block) for block in blocks]
    return "\n".join([*parts, "</body></html>", ""])


def _html_block(block: _Block) -> str:
    if isinstance(block, _Plot):
        data = base64.b64encode(block.png).decode()
        return f'<img alt="{html.escape(block.says)}" src="data:image/png;base64,{data}">'
    if isinstance(block, str):
        return f"<p>{html.escape(block)}</p>"
    heads = "".join(f'<th scope="col">{html.escape(head)}</th>' for head in block.heads)
    rows = ["<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in block.rows]
    return f"<table><thead><tr>{heads}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
