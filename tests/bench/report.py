"""The rows that `make bench` measures, as JSON in a file and as tables in the README's "Measured" section."""

import itertools
import json
import subprocess
from pathlib import Path
from typing import TypedDict

RESULTS = Path(__file__).parent / "results.json"
GPU_RESULTS = Path(__file__).parent / "results-gpu.json"


class Row(TypedDict):
    """One figure: what was measured, its value and its unit."""

    name: str
    value: float
    unit: str


class Results(TypedDict):
    """The figures of one part, the machine that it ran on, and the commit that was measured."""

    machine: str
    tree: str
    rows: list[Row]


def load_results(file: Path = RESULTS) -> dict[str, Results]:
    """Returns the figures of each part's last run, by the name of the part."""
    results: dict[str, Results] = json.loads(file.read_text())
    return results


def save_results(part: str, results: Results, file: Path = RESULTS) -> None:
    """Writes the figures of one part to the JSON file, beside those of the others."""
    file.write_text(json.dumps(load_results(file) | {part: results}, indent=1) + "\n")


def markdown_tables(parts: dict[str, Results]) -> str:
    """Returns the figures as the README shows them: a table for each run of parts on one machine, of one tree."""
    lines: list[str] = []
    for (machine, tree), run in itertools.groupby(parts.values(), key=lambda one: (one["machine"], one["tree"])):
        lines += [f"On {machine}, at `{tree}`:", "", "| measure | figure |", "|---|---:|"]
        lines += [f"| {row['name']} | {figure(row)} |" for one in run for row in one["rows"]]
        lines += [""]
    return "\n".join(lines[:-1])


def figure(row: Row) -> str:
    """Returns a value with its unit, to three significant digits or whole thousands."""
    value = row["value"]
    text = f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return f"{text} {row['unit']}".strip()


def describe_tree() -> str:
    """Returns the commit that is measured, with a `+` where files differ from it; "unknown" outside a repository."""
    said = subprocess.run(["git", "describe", "--always", "--dirty=+"], capture_output=True, text=True, check=False)
    return said.stdout.strip() or "unknown"
