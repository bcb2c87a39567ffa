"""What a worker says of itself: enough to supervise it on progress rather than on being alive."""

import os
import time
from collections import deque
from collections.abc import Mapping

import msgspec

from tailrace.stores.store import Offset


class Progress(msgspec.Struct, frozen=True, kw_only=True):
    """A worker at one moment. Counts are since its process started; `lag` counts records not yet folded and saved.

    `next_offsets` is, by partition and stream, what the saved state has reached. `last_progress_at` is the monotonic
    time, in seconds, of the last save, `last_progress_wall` the same in epoch seconds; 0 before the first.
    """

    pid: int
    partitions: tuple[int, ...] = ()
    fenced: tuple[int, ...] = ()
    ready: bool = False
    events: int = 0
    repeated: int = 0
    dead_letters: int = 0
    saves: int = 0
    thrown_away: int = 0
    skipped_records: int = 0
    recreated_topics: int = 0
    stats_published: int = 0
    lag: Mapping[int, int] = {}
    next_offsets: Mapping[int, Mapping[str, int]] = {}
    events_per_s: float = 0.0
    last_progress_at: float = 0.0
    last_progress_wall: float = 0.0
    last_error: str = ""


class ProgressMeter:
    """Counts for one worker. Written by its thread; `read` may be called from any."""

    def __init__(self) -> None:
        self.partitions: tuple[int, ...] = ()
        self.fenced: tuple[int, ...] = ()
        self.ready = False
        self.events = 0
        self.repeated = 0
        self.dead_letters = 0
        self.saves = 0
        self.thrown_away = 0
        self.skipped_records = 0
        self.recreated_topics = 0
        self.stats_published = 0
        self.last_error = ""
        self._lag: dict[int, int] = {}
        self._next_offsets: dict[int, dict[str, int]] = {}
        self._saved_at = 0.0
        self._saved_wall = 0.0
        self._samples: deque[tuple[float, int]] = deque(maxlen=6)  # (monotonic s, events), one a second

    def note_saved(self, events: int, repeated: int, dead_letters: int) -> None:
        """Counts one save."""
        self.events += events
        self.repeated += repeated
        self.dead_letters += dead_letters
        self.saves += 1
        self._saved_at, self._saved_wall = time.monotonic(), time.time()

    def note_place(self, partition: int, offsets: Mapping[str, Offset], lag: int) -> None:
        """Notes where a partition's saved state stands."""
        self._lag[partition] = lag
        self._next_offsets[partition] = {stream: offset.next_offset for stream, offset in offsets.items()}

    def forget(self, partition: int) -> None:
        """Notes that the partition is no longer this worker's."""
        self._lag.pop(partition, None)
        self._next_offsets.pop(partition, None)

    def sample(self) -> None:
        """Takes a sample for the rate, once a second."""
        now_s = time.monotonic()
        if not self._samples or now_s >= self._samples[-1][0] + 1.0:
            self._samples.append((now_s, self.events))

    def read(self) -> Progress:
        """Returns the progress so far. The rate is of the last five seconds or so."""
        samples = self._samples.copy()
        rate = 0.0
        if samples:
            began_s, before = samples[0]
            rate = (self.events - before) / max(time.monotonic() - began_s, 1e-3)
        return Progress(
            pid=os.getpid(),
            partitions=self.partitions,
            fenced=self.fenced,
            ready=self.ready,
            events=self.events,
            repeated=self.repeated,
            dead_letters=self.dead_letters,
            saves=self.saves,
            thrown_away=self.thrown_away,
            skipped_records=self.skipped_records,
            recreated_topics=self.recreated_topics,
            stats_published=self.stats_published,
            lag=dict(self._lag),
            next_offsets=dict(self._next_offsets),
            events_per_s=round(rate, 1),
            last_progress_at=self._saved_at,
            last_progress_wall=self._saved_wall,
            last_error=self.last_error,
        )
