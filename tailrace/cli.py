"""The command line: `tailrace COMMAND`. Wires settings to the parts; what starts Ray or loads torch is imported late.

An error Tailrace raises on purpose is one line on stderr and exit code 1; Ctrl-C is exit code 130.
"""

import os
import signal
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import click
import msgspec

from tailrace import cli_import
from tailrace.errors import BrokerUnavailable, BundleError, TailraceError
from tailrace.events import ModelAnnouncement
from tailrace.ids import ModelVersion
from tailrace.kafka_clients import create_topics
from tailrace.registry import Registry, announce, new_version, open_registry
from tailrace.schemas import PUBLIC_TYPES, json_schemas
from tailrace.settings import Settings, load_settings
from tailrace.status import load_status
from tailrace.terminal import print_json, show_models, show_settings, show_status, show_topics
from tailrace.topics import tailrace_topics

DEFAULT_FILE = Path("tailrace.toml")


@dataclass
class Session:
    """What every command starts from. Settings are read when first asked for, so `--help` works with bad ones."""

    file: Path | None

    @cached_property
    def settings(self) -> Settings:
        """The settings as they were read."""
        return load_settings(self.file or (DEFAULT_FILE if DEFAULT_FILE.is_file() else None))

    @cached_property
    def connected(self) -> Settings:
        """The settings with the local broker's address where no other Kafka is named and one runs here."""
        settings = self.settings
        if settings.kafka.bootstrap_servers:
            return settings
        from stream.broker import LocalKafka

        found = LocalKafka.find(settings.path("kafka"))
        kafka = msgspec.structs.replace(settings.kafka, bootstrap_servers=found or "")
        return msgspec.structs.replace(settings, kafka=kafka)


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


as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON, for scripts.")


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
    """Print every setting, its value here and what it is."""
    found = session.settings
    if check:
        click.echo("settings are good")
    elif as_json:
        print_json(found)
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
    with _stop_on_signals() as stop, LocalKafka.start(folder, port=port, retention_days=kafka.retention_days) as local:
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


ray_address = click.option(
    "--ray", "address", help="Ray cluster to join, such as `auto` or ray://host:10001 (default: one of its own, here)."
)


@main.command()
@ray_address
@click.pass_obj
def stream(session: Session, address: str | None) -> None:
    """Run the stream workers and their supervisor until Ctrl-C."""
    settings = session.connected
    create_topics(settings.kafka)
    from stream.supervisor import supervise

    with _ray(address), _stop_on_signals() as stop:  # in this order: Ray takes the signals for itself
        supervise(settings, stop=stop)


@main.command()
@ray_address
@click.pass_obj
def serve(session: Session, address: str | None) -> None:
    """Run the gateway and the rankers until Ctrl-C."""
    settings = session.connected
    create_topics(settings.kafka)
    from services.app import start_serving, stop_serving

    with _ray(address), _stop_on_signals() as stop:  # in this order: Ray takes the signals for itself
        try:
            start_serving(settings)
            click.echo(f"http://{settings.gateway.host}:{settings.gateway.port}")
            stop.wait()
        finally:
            stop_serving()


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


# -- models --------------------------------------------------------------------------------------------------------


@main.group()
def models() -> None:
    """The registry: versions, and the pointer that says which one serves."""


@models.command("list")
@as_json
@click.pass_obj
def list_models(session: Session, as_json: bool) -> None:
    """List the published versions, oldest first."""
    registry = open_registry(session.settings)
    found = [registry.manifest(version) for version in registry.versions()]
    found.sort(key=lambda manifest: (manifest.created_at, manifest.version))
    pointer = registry.pointer()
    if as_json:
        print_json({"pointer": pointer, "versions": found})
    else:
        show_models(found, pointer)


@models.command("show")
@click.argument("version", required=False)
@click.pass_obj
def show_model(session: Session, version: str | None) -> None:
    """Print the manifest of VERSION (default: the one that serves) as JSON."""
    registry = open_registry(session.settings)
    print_json(registry.manifest(_version_or_champion(registry, version)))


@models.command("promote")
@click.argument("version")
@click.pass_obj
def promote_model(session: Session, version: str) -> None:
    """Make VERSION serve: move the pointer and announce it. Replicas swap in place."""
    _tell(session, open_registry(session.settings).promote(ModelVersion(version)))


@models.command("rollback")
@click.pass_obj
def rollback_model(session: Session) -> None:
    """Make the version before the present one serve again."""
    _tell(session, open_registry(session.settings).rollback())


@models.command("export")
@click.argument("version")
@click.argument("directory", type=click.Path(path_type=Path))
@click.pass_obj
def export_model(session: Session, version: str, directory: Path) -> None:
    """Copy the files of VERSION, their sums checked, into DIRECTORY (new or empty)."""
    manifest = open_registry(session.settings).export(ModelVersion(version), directory)
    click.echo(f"{len(manifest.files)} files of {version} in {directory}")


@models.command("init")
@click.pass_obj
def init_models(session: Session) -> None:
    """Build version 0 from the base model, publish and promote it, unless a model serves already."""
    settings = session.settings
    registry = open_registry(settings)
    pointer = registry.pointer()
    if pointer is not None:
        click.echo(f"{pointer.champion} serves already")
        return
    from tailrace.features import FEATURE_NAMES, PRIOR_WEIGHTS
    from training.export import build_version_zero

    version = new_version(datetime.now(UTC))
    with tempfile.TemporaryDirectory(prefix="tailrace-export-") as temporary:
        built = build_version_zero(
            Path(temporary),
            version=version,
            feature_names=FEATURE_NAMES,
            prior=PRIOR_WEIGHTS,
            base_model=settings.registry.base_model,
            split_layer=settings.registry.split_layer,
            item_states=settings.registry.item_states,
            max_user_tokens=settings.registry.max_user_tokens,
            max_item_tokens=settings.registry.max_item_tokens,
        )
        registry.publish(Path(temporary), version=version)
    registry.promote(version)
    # Not announced: nobody serves yet, and whoever starts to serve reads the pointer.
    click.echo(f"{version} published and promoted ({built.size_bytes / 1e6:.0f} MB, {built.took_s:.0f} s)")


def _version_or_champion(registry: Registry, version: str | None) -> ModelVersion:
    if version is not None:
        return ModelVersion(version)
    pointer = registry.pointer()
    if pointer is None:
        raise BundleError(f"no model serves from {registry.url}: `tailrace models init` makes the first")
    return pointer.champion


def _tell(session: Session, announcement: ModelAnnouncement) -> None:
    """Announces a pointer that has moved. Where no Kafka answers, says that it moved all the same."""
    try:
        announce(session.connected.kafka, announcement)
    except BrokerUnavailable as error:
        raise BrokerUnavailable(
            f"the pointer is at {announcement.version} but running replicas were not told: {error}; "
            f"then run `tailrace models promote {announcement.version}`"
        ) from error
    click.echo(f"{announcement.version} serves (before: {announcement.previous or 'none'})")


# -- shared --------------------------------------------------------------------------------------------------------


@contextmanager
def _stop_on_signals() -> Iterator[threading.Event]:
    """Gives an event that Ctrl-C and SIGTERM set, instead of tearing up what is running."""
    stop = threading.Event()
    before = {number: signal.signal(number, lambda *_: stop.set()) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _ray(address: str | None) -> Iterator[None]:
    """Joins the Ray cluster at `address`, or runs one on loopback while the block lasts."""
    import ray

    if address is not None:
        ray.init(address=address, namespace="tailrace", log_to_driver=False)
        try:
            yield
        finally:
            ray.shutdown()
        return
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # A short path: Ray's sockets stand below it, and their names may have about a hundred characters.
    with tempfile.TemporaryDirectory(prefix="tailrace-ray-", ignore_cleanup_errors=True) as folder:
        try:
            ray.init(
                num_cpus=max(os.cpu_count() or 1, 4),
                include_dashboard=False,
                namespace="tailrace",
                object_store_memory=200 * 2**20,
                log_to_driver=False,
                _node_ip_address="127.0.0.1",
                _temp_dir=folder,
            )
            yield
        finally:
            ray.shutdown()


if __name__ == "__main__":
    main(prog_name="tailrace")
