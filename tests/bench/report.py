"""The rows that `make bench` measures, as JSON in a file and as the table in the README's "Measured" section."""

import json
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
    """Every figure of one run of `make bench`, and the machine it ran on."""

    machine: str
    rows: list[Row]


def load_results(file: Path = RESULTS) -> Results:
    """Returns the figures of the last run of `make bench`, or of the bench that wrote `file`."""
    results: Results = json.loads(file.read_text())
    return results


def save_results(results: Results, file: Path = RESULTS) -> None:
    """Writes the figures to the JSON file."""
    file.write_text(json.dumps(results, indent=1) + "\n")


def markdown_table(results: Results) -> str:
    """Returns the figures as the README shows them."""
    lines = [f"On {results['machine']}:", "", "| measure | figure |", "|---|---:|"]
    lines += [f"| {row['name']} | {figure(row)} |" for row in results["rows"]]
    return "\n".join(lines)


def figure(row: Row) -> str:
    """Returns a value with its unit, to three significant digits or whole thousands."""
    value = row["value"]
    text = f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return f"{text} {row['unit']}".strip()
