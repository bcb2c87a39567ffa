"""What became of each training round, kept beside the models it made: `rounds/<version>.json` in the registry's folder.

A round that failed leaves its reason here, where `tailrace status` and `tailrace rounds` look, whichever machine it
ran on. A record is written once, when its round ends.
"""

from collections.abc import Mapping
from datetime import datetime
from pathlib import PurePosixPath
from typing import Literal

import msgspec

from tailrace.ids import ModelVersion
from tailrace.registry_files import RegistryFiles
from tailrace.settings import Settings

Outcome = Literal["promoted", "canary", "rejected", "failed"]


class RoundRecord(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One round. `version` is the challenger's, and the round's name. Times by step in seconds."""

    version: ModelVersion
    parent: ModelVersion | None
    outcome: Outcome
    reason: str
    started_at: datetime
    ended_at: datetime
    fresh: int = 0
    replayed: int = 0
    took_s: Mapping[str, float] = {}
    metrics: Mapping[str, float] = {}
    report: str = ""


class RoundLog:
    """The records of every round, on a folder or any fsspec URL."""

    def __init__(self, url: str) -> None:
        self._files = RegistryFiles(url)

    def append(self, record: RoundRecord) -> None:
        """Writes the record of a round that has ended. Raises FileExistsError where it has one already."""
        data = msgspec.json.format(msgspec.json.encode(record), indent=2)
        self._files.create(data, "rounds", f"{record.version}.json")

    def newest(self, count: int = 20) -> list[RoundRecord]:
        """Returns the last rounds, newest first; versions sort by time."""
        names = [PurePosixPath(path).name for path in self._files.match("rounds", "*.json")]
        newest = sorted(names, reverse=True)[:count]
        return [msgspec.json.decode(self._files.read("rounds", name), type=RoundRecord) for name in newest]


def open_round_log(settings: Settings) -> RoundLog:
    """Returns the log of rounds beside the registry the settings name."""
    url = settings.registry.url
    return RoundLog(url if "://" in url else str(settings.path(url)))
