"""The command line: `tailrace COMMAND`. Wires settings to the parts; what starts Ray or loads torch is imported late.

An error Tailrace raises on purpose is one line on stderr and exit code 1; Ctrl-C is exit code 130.
"""

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import click
import msgspec

from tailrace import cli_import
from tailrace.cli_evaluate import evaluate
from tailrace.cli_lab import lab
from tailrace.cli_models import models
from tailrace.cli_session import Session, as_json, ray_address, stop_on_signals
from tailrace.cli_train import read_schedule, rounds, train, watch
from tailrace.errors import BrokerUnavailable, TailraceError
from tailrace.kafka_clients import create_topics
from tailrace.schemas import PUBLIC_TYPES, json_schemas
from tailrace.settings import without_secrets
from tailrace.status import load_status
from tailrace.telemetry import configure_logging
from tailrace.terminal import print_json, show_settings, show_status, show_topics
from tailrace.topics import tailrace_topics


class _Commands(click.Group):
    """A group whose errors are for the person who typed the command."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except TailraceError as error:
            raise click.ClickException(str(error)) from error
        except KeyboardInterrupt:
            click.echo("stopped", err=True)
            ctx.exit(cli_import.INTERRUPTED)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.option("--settings", "file", type=click.Path(path_type=Path, exists=True, dir_okay=False), help="TOML file.")
@click.version_option(package_name="tailrace")
@click.pass_context
def main(ctx: click.Context, file: Path | None) -> None:
    """A streaming recommender that learns from what it recommends.

    Settings come from --settings, or tailrace.toml here if there is one, and from TAILRACE_SECTION__KEY.
    """
    ctx.obj = Session(file)


main.add_command(cli_import.import_command)
main.add_command(cli_import.replay_command)
main.add_command(models)
main.add_command(train)
main.add_command(lab)
main.add_command(rounds)
main.add_command(watch)
main.add_command(evaluate)


# -- contracts and settings ----------------------------------------------------------------------------------------


@main.command()
@click.argument("names", nargs=-1, type=click.Choice(list(PUBLIC_TYPES)))
def schemas(names: tuple[str, ...]) -> None:
    """Print the JSON Schema of the records NAMES (default: all, by name)."""
    made = json_schemas()
    print_json(made[names[0]] if len(names) == 1 else {name: made[name] for name in names or made})


@main.command()
@click.option("--check", is_flag=True, help="Only say whether the settings are good.")
@as_json
@click.pass_obj
def settings(session: Session, check: bool, as_json: bool) -> None:
    """Print every setting, its value here and its default. Passwords are not shown."""
    found = session.settings
    if check:
        click.echo("settings are good")
    elif as_json:
        print_json(without_secrets(found))
    else:
        show_settings(found)


# -- processes -----------------------------------------------------------------------------------------------------


@main.command()
@click.option("--port", type=int, help="Port to listen on (default: that of the last run, or a free one).")
@click.pass_obj
def broker(session: Session, port: int | None) -> None:
    """Run Apache Kafka on this machine, on loopback, until Ctrl-C. Its records stay in data_dir/kafka."""
    from stream.broker import LocalKafka

    folder, kafka = session.settings.path("kafka"), session.settings.kafka
    with stop_on_signals() as stop, LocalKafka.start(folder, port=port, retention_days=kafka.retention_days) as local:
        click.echo(local.bootstrap_servers)
        while local.is_alive() and not stop.wait(0.5):
            pass
        if not stop.is_set():
            raise BrokerUnavailable(f"Kafka ended by itself with status {local.wait()}; see {folder / 'broker.log'}")


@main.command()
@as_json
@click.pass_obj
def topics(session: Session, as_json: bool) -> None:
    """Create the topics that do not exist; refuse those with another partition count."""
    kafka = session.connected.kafka
    ids, found = create_topics(kafka), tailrace_topics(kafka)
    if as_json:
        print_json({role: {**msgspec.to_builtins(topic), "id": ids[role]} for role, topic in found.items()})
    else:
        show_topics(found, ids)


@main.command()
@ray_address
@click.pass_obj
def stream(session: Session, address: str | None) -> None:
    """Run the stream workers and their supervisor until Ctrl-C."""
    settings = session.connected
    configure_logging(settings)
    create_topics(settings.kafka)
    from deploy.ray_cluster import ray_cluster
    from stream.supervisor import supervise

    logs = settings.path("logs") / "ray-stream"
    with ray_cluster(address, keep_logs=logs), stop_on_signals() as stop:  # in this order: Ray takes the signals
        supervise(settings, stop=stop)


@main.command()
@ray_address
@click.pass_obj
def serve(session: Session, address: str | None) -> None:
    """Run the gateway and the rankers until Ctrl-C."""
    settings = session.connected
    configure_logging(settings)
    create_topics(settings.kafka)
    from deploy.ray_cluster import ray_cluster
    from services.app import start_serving, stop_serving

    logs = settings.path("logs") / "ray-serve"
    with ray_cluster(address, keep_logs=logs), stop_on_signals() as stop:  # in this order: Ray takes the signals
        try:
            start_serving(settings)
            click.echo(f"http://{settings.gateway.host}:{settings.gateway.port}")
            stop.wait()
        finally:
            stop_serving()


@main.command()
@click.option("--train-every", help="Also train, every 15m, 2h or 1d.")
@click.pass_obj
def up(session: Session, train_every: str | None) -> None:
    """Run everything on this machine until Ctrl-C: Kafka unless one is named, Ray, stream workers, services."""
    from deploy.local import local_system, rounds_beside
    from training.watchdog import watchdog_beside

    configure_logging(session.settings)
    schedule = None if train_every is None else read_schedule(train_every, None)
    with ExitStack() as stack:
        running = stack.enter_context(local_system(session.settings, click.echo))
        if schedule is not None:
            stack.enter_context(rounds_beside(running, schedule, click.echo))
        else:  # whoever promotes by hand, or trains by `train --once`, is watched too
            stack.enter_context(watchdog_beside(running))
        stack.enter_context(stop_on_signals()).wait()
    click.echo("stopped")


@main.command()
@as_json
@click.pass_obj
def status(session: Session, as_json: bool) -> None:
    """Show the lag of every partition, how many profiles there are, and which model serves."""
    found = load_status(session.connected)
    if as_json:
        print_json(found)
    else:
        show_status(found)


if __name__ == "__main__":
    main(prog_name="tailrace")
