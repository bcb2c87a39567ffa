"""What every command starts from: where the settings come from, and options that several commands share."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import click
import msgspec

from tailrace.settings import Settings, load_settings

DEFAULT_FILE = Path("tailrace.toml")

as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON, for scripts.")


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
