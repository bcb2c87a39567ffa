"""`tailrace import` and `tailrace replay`: the options, the progress bar and the report."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from math import inf
from pathlib import Path
from typing import Any, Protocol

import click
import msgspec
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from tailrace.importers import IMPORTERS, Dataset, Reading, Row, SkipBad
from tailrace.importers.generic import ROLES
from tailrace.importers.source import stop
from tailrace.replay import OnProgress, SendReport, send_import, send_replay
from tailrace.settings import Settings

INTERRUPTED = 130
_SHOW_EVERY_S = 0.1

errors = Console(stderr=True)


class Connected(Protocol):
    """What these commands need of the session."""

    @property
    def connected(self) -> Settings: ...


class _Assignment(click.ParamType[tuple[str, str]]):
    name = "name=value"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, str]:
        name, equals, assigned = str(value).partition("=")
        if not name or not equals:
            self.fail(f"{value!r} is not NAME=VALUE", param, ctx)
        return name, assigned


class _Speed(click.ParamType[float]):
    name = "N|max"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        try:
            speed = inf if value == "max" else float(value)
        except ValueError:
            speed = 0.0
        if not speed > 0:
            self.fail(f"{value!r} is neither `max` nor a number above 0", param, ctx)
        return speed


def _options(command: Any) -> Any:
    options = [
        click.argument("format", type=click.Choice(sorted(IMPORTERS))),
        click.argument("path", type=click.Path(path_type=Path, exists=True)),
        click.option("--to", "role", type=click.Choice(ROLES), default="clicks", help="csv, jsonl: what a row is."),
        click.option("--map", "columns", type=_Assignment(), multiple=True, help="csv, jsonl: FIELD=COLUMN."),
        click.option("--set", "constants", type=_Assignment(), multiple=True, help="csv, jsonl: FIELD=VALUE."),
        click.option(
            "--epoch",
            type=click.Choice(["s", "ms"]),
            default="ms",
            show_default=True,
            help="csv, jsonl: unit of numeric times.",
        ),
        click.option("--skip-bad", is_flag=True, help="Pass over bad rows and list the first twenty."),
        click.option("--resend", is_flag=True, help="Send events again that the log already holds."),
        click.option("--limit", type=click.IntRange(min=1), help="Send no more than so many events."),
        click.option("--json", "as_json", is_flag=True, help="Print the report as JSON, for scripts."),
    ]
    for option in reversed(options):
        command = option(command)
    return click.pass_obj(command)


@click.command("import")
@_options
def import_command(session: Connected, **chosen: Any) -> None:
    """Send the data set at PATH to Kafka as fast as it is taken: items first, then events.

    FORMAT is one of csv, deskdrop, jsonl, mind, movielens, movietweetings. PATH is the folder (for csv and jsonl the
    file); gzipped files are read as they are. A row that cannot be used stops the import before anything is sent.
    Events that the log already holds are passed over.
    """
    dataset, bad = _read(chosen)
    kafka = session.connected.kafka
    with _progress(dataset) as show:
        report = send_import(kafka, dataset, resend=chosen["resend"], limit=chosen["limit"], on_progress=show)
    _finish(report, bad, chosen["as_json"])


@click.command("replay")
@_options
@click.option("--speed", type=_Speed(), default=1.0, show_default=True, help="Times as fast as it happened, or `max`.")
def replay_command(session: Connected, speed: float, **chosen: Any) -> None:
    """Send the data set at PATH to Kafka in the order of its times, paced by them.

    As `import`, but an item is sent when it became available, and the gaps between events are kept, N times shorter.
    """
    dataset, bad = _read(chosen)
    kafka = session.connected.kafka
    with _progress(dataset) as show:
        report = send_replay(
            kafka, dataset, speed=speed, resend=chosen["resend"], limit=chosen["limit"], on_progress=show
        )
    _finish(report, bad, chosen["as_json"])


def _read(chosen: dict[str, Any]) -> tuple[Dataset, SkipBad]:
    bad = SkipBad()
    reading = Reading(
        on_bad=bad if chosen["skip_bad"] else stop,
        role=chosen["role"],
        columns=dict(chosen["columns"]),
        constants=dict(chosen["constants"]),
        epoch_ms=1000 if chosen["epoch"] == "s" else 1,
    )
    return IMPORTERS[chosen["format"]](chosen["path"], reading), bad


@contextmanager
def _progress(dataset: Dataset) -> Iterator[OnProgress]:
    """Gives a function that moves a bar along the data set's own time and shows events a second."""
    columns = (
        TextColumn("{task.fields[day]}"),
        BarColumn(bar_width=30),
        TextColumn("{task.fields[sent]:>9,} sent {task.fields[rate]:>8,.0f}/s {task.fields[present]}"),
        TimeElapsedColumn(),
    )
    span_ms = max(dataset.last_ms - dataset.first_ms, 1)
    with Progress(*columns, console=errors, transient=True, disable=not errors.is_terminal) as progress:
        task = progress.add_task("", total=span_ms, day="items     ", sent=0, rate=0.0, present="")
        begun = shown = time.monotonic()

        def show(report: SendReport, row: Row | None) -> None:
            nonlocal shown
            now = time.monotonic()
            if now - shown < _SHOW_EVERY_S:
                return
            shown = now
            progress.update(task, sent=report.sent, rate=report.sent / (now - begun), present=_present(report.present))
            if row is not None and row.role != "items":
                day = f"{datetime.fromtimestamp(row.at_ms / 1000, UTC):%Y-%m-%d}"
                progress.update(task, completed=row.at_ms - dataset.first_ms, day=day)

        yield show


def _present(count: int) -> str:
    return f"({count:,} there already)" if count else ""


def _finish(report: SendReport, bad: SkipBad, as_json: bool) -> None:
    if as_json:
        found = msgspec.to_builtins(report) | {"bad": bad.count, "bad_rows": bad.listed}
        click.echo(msgspec.json.format(msgspec.json.encode(found), indent=2).decode())
    else:
        rate = report.sent / report.seconds if report.seconds else 0.0
        click.echo(
            f"{report.items:,} items and {report.events:,} events sent, {report.acknowledged:,} acknowledged, "
            f"{report.present:,} there already; {report.seconds:.1f} s, {rate:,.0f}/s"
        )
        if report.behind_s >= 1:
            click.echo(f"the pace was missed by up to {report.behind_s:.1f} s")
        if bad.count:
            click.echo(f"{bad.count:,} bad rows were passed over:", err=True)
            for line in bad.listed:
                click.echo(f"  {line}", err=True)
            if bad.count > len(bad.listed):
                click.echo(f"  and {bad.count - len(bad.listed):,} more", err=True)
    if report.interrupted:
        click.echo("stopped; the same command again goes on from there", err=True)
        raise click.exceptions.Exit(INTERRUPTED)
