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
    lag, now, most = sum(lag_by_partition.values()), len(current), len(lag_by_partition)
    wanted = ceil(lag / settings.lag_per_worker)
    if wanted < now:
        wanted = now - 1 if lag <= settings.lag_per_worker * (now - 1) / 2 else now
    count = max(
        min(wanted, settings.max_workers, len(lag_by_partition)), min(settings.min_workers, len(lag_by_partition))
    )
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
    """Says when a worker has had something to do, and done none of it, for too long."""

    def __init__(self, stall_s: float) -> None:
        self._stall_s = stall_s
        self._seen: dict[int, tuple[object, float]] = {}  # worker: how far it was, since when (monotonic s)

    def has_stalled(self, worker: int, lag: int, reached: object, now_s: float) -> bool:
        """Returns whether `reached` has not changed for `stall_s` although there was lag. None: it does not answer."""
        held = self._seen.get(worker)
        if held is None or lag == 0 or (reached is not None and reached != held[0]):
            self._seen[worker] = (reached if reached is not None or held is None else held[0], now_s)
            return False
        return now_s - held[1] > self._stall_s

    def forget(self, workers: Sequence[int]) -> None:
        """Gives these workers their time anew."""
        for worker in workers:
            self._seen.pop(worker, None)
