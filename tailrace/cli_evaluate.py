"""`tailrace evaluate`: quality on recorded data, by the functions that serve and train. Needs no Kafka."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from tailrace.cli_session import Session, as_json
from tailrace.importers import IMPORTERS, Reading
from tailrace.terminal import print_json

if TYPE_CHECKING:
    from deploy.evaluation_report import Evaluation

_folder = click.argument("path", type=click.Path(path_type=Path, exists=True))
_out = click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder for results.json, plots and bundles (default: data_dir/evaluations/FORMAT).",
)
_seed = click.option("--seed", type=int, default=0, show_default=True, help="Of sampling, training and intervals.")


@click.group()
def evaluate() -> None:
    """Measure ranking quality on recorded data: a table, results.json and plots, with bootstrap intervals."""


@evaluate.command("deskdrop")
@_folder
@click.option("--protocol", type=click.Choice(["prequential"]), default="prequential", show_default=True)
@_out
@_seed
@click.option("--every", type=click.IntRange(min=1), default=1, show_default=True, help="Take each N-th event only.")
@click.option("--limit", type=click.IntRange(min=1), help="Stop after so many ranked events.")
@click.option(
    "--round-every",
    type=click.IntRange(min=0),
    default=2000,
    show_default=True,
    help="Ranked events between two rounds of training; 0: rules and version 0 alone.",
)
@click.option("--retrain-lambdarank", is_flag=True, help="Train LambdaRank anew at every round, too.")
@as_json
@click.pass_obj
def evaluate_deskdrop(
    session: Session, /, path: Path, protocol: str, out: Path | None, as_json: bool, **chosen: Any
) -> None:
    """Replay the Deskdrop folder PATH: rank every first touch among all items seen so far, then learn from it.

    The first three quarters of the file warm up. Rules, version 0 of the model, LambdaRank and the model retrained as
    the stream goes meet the same events.
    """
    from deploy.prequential import Plan, evaluate_prequential

    dataset = IMPORTERS["deskdrop"](path, Reading())
    folder = out or session.settings.path("evaluations") / "deskdrop"
    with _progress() as show:
        found = evaluate_prequential(dataset, session.settings, Plan(**chosen), folder, show)
    _show(found, folder, as_json)


@evaluate.command("mind")
@_folder
@click.option("--protocol", type=click.Choice(["slates"]), default="slates", show_default=True)
@_out
@_seed
@as_json
@click.pass_obj
def evaluate_mind(session: Session, path: Path, protocol: str, out: Path | None, seed: int, as_json: bool) -> None:
    """Learn from the slates of the MIND folder PATH but those of its last day, and rank those.

    Before and after fine-tuning, beside TF-IDF and the untrained model's cosine; with and without same-day clicks.
    """
    from deploy.mind_slates import evaluate_slates

    dataset = IMPORTERS["mind"](path, Reading())
    folder = out or session.settings.path("evaluations") / "mind"
    with _progress() as show:
        found = evaluate_slates(dataset, session.settings, folder, seed=seed, progress=show)
    _show(found, folder, as_json)


@contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None]]:
    """Gives a function that shows what is being done, and how much of it."""
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=30), MofNCompleteColumn())
    console = Console(stderr=True)
    with Progress(
        *columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console, disable=not console.is_terminal
    ) as progress:
        task = progress.add_task("reading", total=None)
        yield lambda step, done, total: progress.update(task, description=step, completed=done, total=total)


def _show(found: "Evaluation", folder: Path, as_json: bool) -> None:
    if as_json:
        print_json(found)
        return
    table = Table(title=found.title, box=None, header_style="bold", pad_edge=False, title_justify="left")
    table.add_column("ranking by")
    for metric in found.figures[0].metrics:
        table.add_column(metric, justify="right")
    for figures in found.figures:
        cells = [f"{one.mean:.3f} [{one.low:.3f}, {one.high:.3f}]" for one in figures.metrics.values()]
        table.add_row(figures.ranking, *cells)
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    for name, value in found.facts.items():
        click.echo(f"{name}: {value}")
    click.echo(f"written to {folder}")
