"""What a bundle says of the round that made it, `training.json`: what was read and learned, for the round after it."""

from pathlib import Path

import msgspec

from tailrace.errors import BundleError
from tailrace.ids import ModelVersion
from training.examples import JoinCounts
from training.log_window import AlreadyRead, LogWindow

RECORD_FILE = "training.json"


class TrainingRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One round's reading. What was shown from `learned_until_ms` on was not learned from: the gate decided on it."""

    parent: ModelVersion
    window: LogWindow
    counts: JoinCounts
    learned_until_ms: int
    fresh: int
    replayed: int

    def already(self) -> AlreadyRead:
        """Returns what the next round need not learn from as if it were new."""
        return AlreadyRead(learned_until_ms=self.learned_until_ms, cutoff_ms=self.window.cutoff_ms)


def save_record(record: TrainingRecord, directory: Path) -> None:
    """Writes `training.json` into a bundle's folder."""
    (directory / RECORD_FILE).write_bytes(msgspec.json.format(msgspec.json.encode(record), indent=2))


def load_record(directory: Path) -> TrainingRecord | None:
    """Returns the record of a bundle, or None where no round made it. Raises BundleError where it is damaged."""
    path = directory / RECORD_FILE
    if not path.exists():
        return None
    try:
        return msgspec.json.decode(path.read_bytes(), type=TrainingRecord)
    except (OSError, msgspec.MsgspecError) as error:
        raise BundleError(f"{path}: {error}") from error
