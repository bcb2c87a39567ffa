"""Item counters by row of the catalogue: what the shares of all partitions come to, in arrays. Knows no lock.

Shapes: R rows, N asked for, K kinds (`counters.KINDS`), H half-lives (`counters.HALF_LIVES_S`), T touches, V visitors.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from tailrace.counters import HALF_LIVES_S, KINDS, MAX_TOUCHES, MAX_VISITORS, add_decayed
from tailrace.events import ItemStats

Rows = NDArray[np.int64]
Floats = NDArray[np.float32]
Times = NDArray[np.int64]
Buckets = NDArray[np.int32]

NEVER_MS = -(2**53)  # stands in time columns for "has not happened"
NOBODY = -1  # stands in visitor columns for "no visitor"
_HALF_LIVES_MS = np.array(HALF_LIVES_S, dtype=np.float64) * 1000


class CounterColumns:
    """Arrays by row; whoever holds it takes care that nobody reads a row while it is written."""

    def __init__(self, rows: int) -> None:
        self.first_ms: Times = np.full(rows, NEVER_MS, dtype=np.int64)
        self.touches_ms: Times = np.full((rows, MAX_TOUCHES), NEVER_MS, dtype=np.int64)
        self.visitors: Buckets = np.full((rows, MAX_VISITORS), NOBODY, dtype=np.int32)
        self.visits_ms: Times = np.full((rows, MAX_VISITORS), NEVER_MS, dtype=np.int64)
        self._sums: Floats = np.zeros((rows, len(KINDS), len(HALF_LIVES_S)), dtype=np.float32)
        self._held_ms: Times = np.zeros((rows, len(KINDS)), dtype=np.int64)

    def grow(self) -> None:
        """Adds as many empty rows as there are."""
        empty = CounterColumns(len(self.first_ms))
        for name, of_empty in vars(empty).items():
            setattr(self, name, np.concatenate([getattr(self, name), of_empty]))

    def put(self, row: int, shares: Sequence[ItemStats]) -> None:
        """Sets a row to what the shares of the partitions come to; nothing, where there are none."""
        # 1. Sums, by kind: each partition's share decayed to the newest of them.
        self._sums[row], self._held_ms[row] = 0.0, 0
        for index, kind in enumerate(KINDS):
            of_kind = [share.sums[kind] for share in shares if kind in share.sums]
            if of_kind:
                total = of_kind[0] if len(of_kind) == 1 else add_decayed(of_kind)
                self._sums[row, index], self._held_ms[row, index] = total.sums, total.at_ms
        # 2. The newest touches of all partitions, newest first.
        newest = sorted((at_ms for share in shares for at_ms in share.touches_ms), reverse=True)[:MAX_TOUCHES]
        self.touches_ms[row] = newest + [NEVER_MS] * (MAX_TOUCHES - len(newest))
        # 3. The newest visitors of all partitions, newest first.
        visitors = sorted((visitor for share in shares for visitor in share.visitors), reverse=True)[:MAX_VISITORS]
        nobody = [(NEVER_MS, NOBODY)] * (MAX_VISITORS - len(visitors))
        self.visits_ms[row], self.visitors[row] = zip(*visitors, *nobody, strict=True)
        # 4. When it all began.
        self.first_ms[row] = min((at for share in shares if (at := share.first_ms) is not None), default=NEVER_MS)

    def sums(self, rows: Rows, now_ms: int) -> Floats:
        """Returns float32 [N,K,H]: the rows' sums decayed to `now_ms`."""
        age_NK = np.maximum(now_ms - self._held_ms[rows], 0).astype(np.float64)
        result: Floats = self._sums[rows] * np.exp2(-age_NK[:, :, None] / _HALF_LIVES_MS).astype(np.float32)
        return result

    def trend(self, kind: str, half_life: int, now_ms: int) -> Floats:
        """Returns float32 [R]: every row's sum of one kind at one half-life (an index of HALF_LIVES_S)."""
        index = KINDS.index(kind)
        age_R = np.maximum(now_ms - self._held_ms[:, index], 0)
        result: Floats = self._sums[:, index, half_life] * np.exp2(-age_R / _HALF_LIVES_MS[half_life]).astype(
            np.float32
        )
        return result
