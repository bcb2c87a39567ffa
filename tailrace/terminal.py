"""What the commands print: JSON for scripts, tables for people. Knows neither Kafka nor the registry."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import click
import msgspec
from rich.console import Console
from rich.table import Table

from tailrace.bundle import Manifest
from tailrace.ids import ModelVersion
from tailrace.pointer import Pointer
from tailrace.rounds import RoundRecord
from tailrace.settings import Settings, without_secrets
from tailrace.status import Status
from tailrace.topics import Topic


def print_json(value: Any) -> None:
    """Prints anything msgspec can encode as indented JSON."""
    click.echo(msgspec.json.format(msgspec.json.encode(value), indent=2).decode())


def show_settings(settings: Settings) -> None:
    """Prints every setting but the secrets, with its default where it differs."""
    table = _table("setting", "value", "default")
    defaults = dict(_flat(msgspec.to_builtins(Settings())))
    for name, value in _flat(without_secrets(settings)):
        default = defaults.get(name)
        table.add_row(name, _short(value), "" if value == default else _short(default))
    _print(table)


def show_topics(topics: Mapping[str, Topic], ids: Mapping[str, str]) -> None:
    """Prints the topics as they exist."""
    table = _table("topic", "key", "partitions", "cleanup", "kept", "id")
    for role, topic in topics.items():
        kept = f"{topic.retention_ms / 86_400_000:g} days" if topic.retention_ms else "latest of each key"
        table.add_row(topic.name, topic.key, str(topic.partitions), topic.cleanup, kept, ids[role])
    _print(table)


def show_status(status: Status) -> None:
    """Prints the end of every stream with its lag in brackets, the profiles, what serves, and the last round."""
    streams = [stream.stream for stream in status.partitions[0].streams]
    table = _table("partition", *(f"{stream} (lag)" for stream in streams), "profiles")
    for partition in status.partitions:
        cells = [f"{stream.end:,} ({stream.lag:,})" for stream in partition.streams]
        table.add_row(str(partition.partition), *cells, f"{partition.profiles:,}")
    _print(table)
    click.echo(f"{status.profiles:,} profiles, lag {status.lag:,}, Kafka at {status.bootstrap_servers}")
    pointer = status.pointer
    click.echo("no model" if pointer is None else f"model {_told(pointer)} since {pointer.updated_at:%F %T}")
    if (last := status.last_round) is not None:
        click.echo(f"last round {last.version}, ended {last.ended_at:%F %T}: {last.outcome}; {last.reason}")


def show_models(manifests: Sequence[Manifest], pointer: Pointer | None) -> None:
    """Prints the versions in the order given and marks those that serve: the champion, and a canary with its share."""
    table = _table("", "version", "published", "base model", "precisions", "MB", "parent", "metrics")
    for manifest in manifests:
        table.add_row(
            "" if pointer is None else _part_of(manifest.version, pointer),
            manifest.version,
            f"{manifest.created_at:%F %T}",
            manifest.model.base_model,
            ", ".join(manifest.model.precisions),
            f"{sum(file.bytes for file in manifest.files.values()) / 1e6:.1f}",
            manifest.parent or "",
            ", ".join(f"{name} {value:.4g}" for name, value in manifest.metrics.items()),
        )
    _print(table)


def _part_of(version: ModelVersion, pointer: Pointer) -> str:
    if version == pointer.canary:
        return f"canary {pointer.canary_share:.0%}"
    return "" if version != pointer.champion else "serves, pinned" if pointer.pinned else "serves"


def show_rounds(records: Sequence[RoundRecord]) -> None:
    """Prints what became of training rounds, in the order given."""
    table = _table("round", "parent", "outcome", "fresh", "replayed", "seconds", "reason", "report")
    for record in records:
        table.add_row(
            record.version,
            record.parent or "",
            record.outcome,
            f"{record.fresh:,}",
            f"{record.replayed:,}",
            f"{sum(record.took_s.values()):.0f}",
            record.reason,
            record.report,
        )
    _print(table)


def _told(pointer: Pointer) -> str:
    if pointer.canary is not None:
        return f"{pointer.champion} and, for {pointer.canary_share:.0%} of the users, {pointer.canary}"
    return f"{pointer.champion}{', pinned,' if pointer.pinned else ''}"


def _print(table: Table) -> None:
    # Where nobody looks (a pipe, a file) a row is a line: nothing is folded to the width of a screen.
    Console(width=None if sys.stdout.isatty() else 250).print(table)


def _table(*columns: str) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict) and value and not prefix:
            yield from _flat(value, f"{name}.")
        else:
            yield prefix + name, value


def _short(value: Any) -> str:
    return msgspec.json.encode(value).decode()
