"""`tailrace train`, `watch` and `rounds`: rounds now or by schedule, what watches them, and what became of them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from tailrace.cli_session import Session, as_json, ray_address, stop_on_signals
from tailrace.errors import SettingsError
from tailrace.rounds import RoundRecord, open_round_log
from tailrace.telemetry import configure_logging
from tailrace.terminal import print_json, show_rounds

if TYPE_CHECKING:
    from training.schedule import Schedule


@click.command()
@click.option("--once", is_flag=True, help="Run one round now, and end.")
@click.option("--every", help="Run a round every 15m, 2h or 1d.")
@click.option("--after-examples", type=click.IntRange(min=1), help="Run a round after so many new impressions.")
@ray_address
@click.pass_obj
def train(session: Session, once: bool, every: str | None, after_examples: int | None, address: str | None) -> None:
    """Fine-tune on fresh feedback; a challenger that passes the gate serves, without a restart.

    With --every or --after-examples it runs until Ctrl-C, watches canaries, and promotes them or takes them back.
    """
    from deploy.ray_cluster import ray_cluster
    from deploy.training_job import train_by_schedule, train_once

    schedule = read_schedule(every, after_examples)
    if once == (schedule.every_s is not None or schedule.after_examples is not None):
        raise SettingsError("say --once, or --every and --after-examples")
    settings = session.connected
    configure_logging(settings)
    logs = settings.path("logs") / "ray-train"
    with ray_cluster(address, keep_logs=logs), stop_on_signals() as stop, _progress() as show:
        if once:
            _tell(train_once(settings, show))
        else:
            train_by_schedule(settings, schedule, stop=stop, ended=_tell, show=show)


@click.command()
@click.pass_obj
def watch(session: Session) -> None:
    """Watch canaries and fresh champions until Ctrl-C: promote them, or take them back.

    `tailrace up`, and `tailrace train` by schedule, do so by themselves. Where rounds are begun one by one, or versions
    promoted by hand, this runs beside the services: a canary that nobody watches stays one.
    """
    from training.watchdog import watch as watch_models

    settings = session.connected
    configure_logging(settings)
    with stop_on_signals() as stop:
        watch_models(
            settings,
            stop=stop,
            decided=lambda version, judgement: click.echo(f"{version}: {judgement.action}; {judgement.reason}"),
        )


@click.command()
@click.option("--count", type=click.IntRange(min=1), default=10, show_default=True, help="How many.")
@as_json
@click.pass_obj
def rounds(session: Session, count: int, as_json: bool) -> None:
    """Show what became of the last training rounds, and why."""
    found = open_round_log(session.settings).newest(count)
    if as_json:
        print_json(found)
    else:
        show_rounds(found)


def read_schedule(every: str | None, after_examples: int | None) -> "Schedule":
    """Returns the schedule that the options state. Raises SettingsError for what is no duration."""
    from training.schedule import Schedule, parse_duration

    try:
        return Schedule(None if every is None else parse_duration(every), after_examples)
    except ValueError as error:
        raise SettingsError(f"how often to train: {error}") from error


def _tell(record: RoundRecord) -> None:
    took_s = sum(record.took_s.values())
    click.echo(f"{record.version}: {record.outcome} after {took_s:.0f} s; {record.reason}")
    if record.report:
        click.echo(f"report: {record.report}")
    if record.outcome == "canary":
        click.echo(
            "on trial: what watches (`tailrace watch`, `up`, or `train` by schedule) promotes it or takes it back"
        )


@contextmanager
def _progress() -> Iterator[Callable[[tuple[str, int, int]], None]]:
    """Gives what shows a round's progress: a bar on a terminal, nothing elsewhere."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description:<28}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("waiting", total=None)

        def show(step: tuple[str, int, int]) -> None:
            what, done, total = step
            progress.update(task, description=what, completed=done, total=total or None)

        yield show
