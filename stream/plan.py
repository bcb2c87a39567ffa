"""How many stream workers there should be, who owns which partitions, and when one has stalled. Pure."""

from collections.abc import Iterable, Mapping, Sequence
from math import ceil

from tailrace.settings import StreamSettings

Assignment = Mapping[int, tuple[int, ...]]  # worker number: the partitions it owns


def plan_workers(lag_by_partition: Mapping[int, int], current: Assignment, settings: StreamSettings) -> Assignment:
    """Returns who should own what: every partition of `lag_by_partition` once, moving as few as possible.

    One worker is justified per `lag_per_worker` records of lag. More are added at once; one is taken away when what
    is left would have at most half of that to do, so that a lag about the limit does not make workers come and go.
    """
    lag, now, partitions = sum(lag_by_partition.values()), len(current), len(lag_by_partition)
    wanted = ceil(lag / settings.lag_per_worker)
    if wanted < now:
        wanted = now - 1 if lag <= settings.lag_per_worker * (now - 1) / 2 else now
    count = min(max(min(wanted, settings.max_workers), settings.min_workers), partitions)
    return _assign(lag_by_partition, current, count)


def _assign(partitions: Iterable[int], current: Assignment, count: int) -> Assignment:
    numbers = sorted(current)[:count]
    numbers += [number for number in range(count + len(current)) if number not in current][: count - len(numbers)]
    unowned = set(partitions)
    share, larger = divmod(len(unowned), count)
    # The larger shares go to those who own most already.
    most_first = sorted(numbers, key=lambda number: (-len(current.get(number, ())), number))
    quota = {number: share + (rank < larger) for rank, number in enumerate(most_first)}
    kept: dict[int, list[int]] = {}
    for number in numbers:
        kept[number] = [p for p in current.get(number, ()) if p in unowned][: quota[number]]
        unowned.difference_update(kept[number])
    left = sorted(unowned)
    for number in numbers:
        room = quota[number] - len(kept[number])
        kept[number] += left[:room]
        del left[:room]
    return {number: tuple(sorted(kept[number])) for number in sorted(numbers)}


class StallWatch:
    """Says when a worker has had something to do, and done none of it, for too long.

    One that has not answered since it was started is given a minute at least: processes start slowly on a busy machine.
    """

    def __init__(self, stall_s: float, start_s: float = 60.0) -> None:
        self._stall_s = stall_s
        self._start_s = max(stall_s, start_s)
        self._seen: dict[int, tuple[object, float]] = {}  # worker: how far it was, since when (monotonic s)

    def has_stalled(self, worker: int, lag: int, reached: object, now_s: float) -> bool:
        """Returns whether there was lag all the time and `reached` has not changed. None: it does not answer."""
        before, since_s = self._seen.get(worker, (None, now_s))
        if lag == 0 or (reached is not None and reached != before):
            since_s = now_s
        self._seen[worker] = (before if reached is None else reached, since_s)
        return now_s - since_s > (self._start_s if self._seen[worker][0] is None else self._stall_s)

    def forget(self, workers: Sequence[int]) -> None:
        """Forgets these workers: they are started anew, or gone."""
        for worker in workers:
            self._seen.pop(worker, None)
