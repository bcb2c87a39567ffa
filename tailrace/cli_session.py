"""What every command starts from: where the settings come from, and options that several commands share."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import click
import msgspec

from tailrace.settings import Settings, load_settings

DEFAULT_FILE = Path("tailrace.toml")

as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON, for scripts.")
ray_address = click.option(
    "--ray", "address", help="Ray cluster to join, such as `auto` or ray://host:10001 (default: one of its own, here)."
)


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


@contextmanager
def stop_on_signals() -> Iterator[threading.Event]:
    """Gives an event that Ctrl-C and SIGTERM set, instead of tearing up what is running."""
    stop = threading.Event()
    before = {number: signal.signal(number, lambda *_: stop.set()) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
