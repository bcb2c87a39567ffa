"""What a person sees of the demo: a live table on a terminal, lines elsewhere, a summary at the end."""

import time
from collections.abc import Sequence

import numpy as np
from rich.console import Console, Group
from rich.panel import Panel
from rich.table import Table

from deploy.readers import ARMS, STRETCH_S, Tally, Worth


def percentiles(samples: Sequence[float]) -> str:
    """Returns "p50 / p99 ms" of the samples, or a dash where there are none."""
    if not samples:
        return "–"
    p50, p99 = np.percentile(np.asarray(samples), [50, 99])
    return f"{p50:.0f} / {p99:.0f} ms"


def facts(tally: Tally, lag: int, ceiling: float) -> list[tuple[str, str]]:
    """Returns what there is to tell, as (name, figure) rows."""
    elapsed = max(time.monotonic() - tally.started, 1e-9)
    rows = [
        ("events", f"{tally.events:,} ({tally.events / elapsed:.0f}/s)"),
        ("stream lag", f"{lag:,} records"),
        ("recommendations", f"{tally.answers:,} ({tally.answers / elapsed:.1f}/s), {tally.failed} failed calls"),
        ("request p50 / p99", percentiles(tally.request_ms)),
        ("click to visible p50 / p99", percentiles(tally.visible_ms)),
    ]
    rows += [(f"click rate, {arm}", _rate(tally.by_arm[arm])) for arm in ARMS]
    rows += [(f"· by model {version}", _describe(worth)) for version, worth in tally.by_version.items()]
    rows.append(("best attainable at the start", f"{100 * ceiling:.2f} %"))
    degraded = {rung: count for rung, count in tally.degraded.items() if rung != "none"}
    rows.append(("degraded answers", ", ".join(f"{count} {rung}" for rung, count in degraded.items()) or "none"))
    return rows


def _describe(worth: Worth) -> str:
    """Returns what slates came to in one line: clicks, and what the world expects of them."""
    return f"{_rate(worth)}, {100 * worth.expected_rate:.2f} % expected: {100 * worth.attained:.0f} % of the best"


def _rate(worth: Worth) -> str:
    return f"{100 * worth.click_rate:.2f} %  ({worth.clicked:,} of {worth.shown:,})"


def live_panel(tally: Tally, lag: int, ceiling: float, remaining_s: float) -> Panel:
    """Returns the live view: the figures, and the newest answer with its reasons."""
    figures = Table.grid(padding=(0, 2))
    for name, figure in facts(tally, lag, ceiling):
        figures.add_row(f"[dim]{name}[/]", figure)
    answer = tally.last_answer
    newest = Table(title=f"latest answer · model {answer.get('model_version', '–')}", title_justify="left", box=None)
    newest.add_column("item", no_wrap=True)
    newest.add_column("why", style="dim", no_wrap=True)
    for row in answer.get("items", [])[:5]:
        newest.add_row(row["title"], "; ".join(row.get("reasons", [])[:2]))
    return Panel(Group(figures, "", newest), title=f"Tailrace · {max(remaining_s, 0):.0f} s left")


def print_summary(console: Console, tally: Tally, lag: int, ceiling: float) -> None:
    """Prints the figures of the whole run as a table, and how the slates did as time went by."""
    table = Table(title="What happened", title_justify="left")
    table.add_column("measure")
    table.add_column("figure", justify="right")
    for name, figure in facts(tally, lag, ceiling):
        table.add_row(name, figure)
    console.print(table)
    stretches = Table(title=f"Personalised slates as time went by, every {STRETCH_S} s", title_justify="left")
    for column in ("from", "clicked", "expected by the world", "of the best slates"):
        stretches.add_column(column, justify="right")
    for stretch, worth in sorted(tally.by_stretch.items()):
        stretches.add_row(
            f"{stretch * STRETCH_S} s",
            f"{100 * worth.click_rate:.2f} %",
            f"{100 * worth.expected_rate:.2f} %",
            f"{100 * worth.attained:.0f} %",
        )
    console.print(stretches)
