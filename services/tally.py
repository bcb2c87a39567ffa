"""How one version has done in this replica: what it answered, how often it failed, and how long it took to score."""

import threading
from collections import deque

import numpy as np

from services.bodies import RankedAnswer, VersionStats

_WINDOW = 512  # answers whose times are kept


class VersionTally:
    """Counts since the version was loaded here, warm-up left out. Any thread may note and read."""

    def __init__(self) -> None:
        self._requests = self._below_top = self._errors = 0
        self._score_ms: deque[float] = deque(maxlen=_WINDOW)
        self._lock = threading.Lock()

    def note_answer(self, answer: RankedAnswer, *, failed: bool) -> None:
        """Counts an answer; `failed` says that the model raised on the way to it."""
        with self._lock:
            self._requests += 1
            self._errors += failed
            # A profile that could not be read says nothing of the model.
            if answer.degraded == "no_text":
                self._below_top += 1
            else:
                self._score_ms.append(answer.timings.get("score", 0.0))

    def note_no_answer(self) -> None:
        """Counts a request that ended in an error."""
        with self._lock:
            self._requests += 1
            self._below_top += 1
            self._errors += 1

    def stats(self) -> VersionStats:
        """Returns the counts, and percentiles of the newest answers' times to score."""
        with self._lock:
            requests, below_top, errors = self._requests, self._below_top, self._errors
            score_ms = list(self._score_ms)
        p50, p99 = np.percentile(score_ms, [50, 99]).tolist() if score_ms else (None, None)
        return VersionStats(requests=requests, below_top=below_top, errors=errors, score_p50_ms=p50, score_p99_ms=p99)
