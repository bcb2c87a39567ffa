"""`make bench`: every measurement the README shows, in one run. `--only NAME` measures one part anew."""

import os
import platform
from collections.abc import Callable
from functools import partial

import click
import torch
from rich.console import Console
from rich.table import Table

from tailrace.settings import load_settings
from tailrace.telemetry import configure_logging
from tests import readme
from tests.bench.decoding import bench_decoding
from tests.bench.freshness import bench_freshness
from tests.bench.ranker import bench_ranker
from tests.bench.report import Row, describe_tree, figure, save_results
from tests.bench.stream import bench_stream
from tests.bench.swaps import SWAPS, bench_swaps
from tests.bench.system import bench_system
from tests.bench.training import bench_training

BENCHES: dict[str, Callable[[Console], list[Row]]] = {
    "system": bench_system,
    "ranker": bench_ranker,
    "stream": bench_stream,
    "decoding": bench_decoding,
    "training": bench_training,
    "freshness": bench_freshness,
    "swaps": bench_swaps,
}


@click.command()
@click.option("--only", type=click.Choice(list(BENCHES)), default=None, help="measure this part alone")
@click.option("--swaps", type=click.IntRange(min=2), default=SWAPS, show_default=True, help="versions replaced")
def main(only: str | None, swaps: int) -> None:
    """Measures, prints a table, and writes tests/bench/results.json and the README's tables, part by part."""
    configure_logging(load_settings(environ={}, log_level="error"))
    console = Console()
    rows: list[Row] = []
    machine, tree = _describe_machine(), describe_tree()  # what was measured, whatever is edited meanwhile
    for name, bench in (BENCHES | {"swaps": partial(bench_swaps, swaps=swaps)}).items():
        if only in (None, name):
            console.rule(name)
            found = bench(console)
            rows += found
            save_results(name, {"machine": machine, "tree": tree, "rows": found})
            readme.main()
    table = Table("measure", "figure", title="Measured", title_justify="left")
    for row in rows:
        table.add_row(row["name"], figure(row))
    console.print(table)


def _describe_machine() -> str:
    """Returns what a figure depends on; AMX makes products in bf16 and int8 several times as fast."""
    amx = "with AMX" if torch.cpu._is_amx_tile_supported() else "without AMX"
    return f"{os.cpu_count()} cores {amx}, no GPU, {platform.system()}, Python {platform.python_version()}"


if __name__ == "__main__":
    main()
