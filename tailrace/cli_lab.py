"""`tailrace lab`: simulated days with a training round after each, beside arms whose worth is known."""

from pathlib import Path

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from tailrace.cli_session import Session


@click.command()
@click.option("--days", type=click.IntRange(min=1), default=6, show_default=True, help="Rounds run between days.")
@click.option("--visits", type=click.IntRange(min=1), default=1500, show_default=True, help="Slates shown in a day.")
@click.option("--readers", type=click.IntRange(min=1), default=100, show_default=True, help="Readers on the first day.")
@click.option("--seed", "seeds", type=int, multiple=True, help="Which world; several run one after the other.")
@click.option("--rounds/--no-rounds", default=True, help="Without: version 0 serves all days, for comparison.")
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), help="Where to write (default: data_dir/lab).")
@click.pass_obj
def lab(
    session: Session, days: int, visits: int, readers: int, seeds: tuple[int, ...], rounds: bool, out: Path | None
) -> None:
    """Show whether the loop learns, in a simulated world whose best answer is known."""
    from deploy.demo import load_books
    from deploy.lab import run_lab, summarise
    from deploy.lab_plot import plot_runs
    from deploy.simulated_days import ARMS, Habits
    from tailrace.telemetry import configure_logging

    console = Console()
    settings = session.settings
    folder = (out or settings.path("lab")).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lab.log").open("a") as log_file:
        configure_logging(settings, log_file)
        columns = (TextColumn("{task.description:<32}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        runs = []
        with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as progress:
            task = progress.add_task("", total=None)

            def show(what: str, done: int, total: int) -> None:
                progress.update(task, description=what, completed=done, total=total or None)

            for seed in seeds or (0,):
                habits = Habits(readers=readers, readers_new_each_day=readers // 10, visits_a_day=visits)
                console.print(f"[bold]seed {seed}[/]")
                runs.append(
                    run_lab(
                        folder / f"seed-{seed}",
                        load_books(),
                        habits,
                        settings,
                        days=days,
                        seed=seed,
                        progress=show,
                        tell=console.print,
                        rounds=rounds,
                    )
                )
    table = Table("seed", "day", "version", *ARMS, "of the lift", "against control [95 %]", title="Click rate, %")
    for run in runs:
        for day in run.days:
            gain, low, high = run.against_control(day)
            rates = [f"{100 * day.arms[arm].click_rate:.2f}" for arm in ARMS]
            bounds = f"{100 * gain:+.1f} % [{100 * low:+.1f}, {100 * high:+.1f}]"
            shares = f"{100 * day.lift_share():.0f} %"
            table.add_row(str(run.seed), str(day.day + 1), day.version, *rates, shares, bounds)
    console.print(table)
    (folder / "lab.json").write_bytes(summarise(runs))
    plot_runs(runs, folder / "lab.png")
    console.print(f"written: {folder / 'lab.json'}, {folder / 'lab.png'}")
