"""Which examples of a window a round learns from: the newest of the fresh ones, and a sample of the rest. Pure.

The sample is weighted and without replacement (Efraimidis and Spirakis 2006, A-Res: keep the largest `u ** (1 / w)`).
With weights that halve every half-life, the order of `log w - log(-log u)` is the same and does not depend on when one
looks, so it is kept in that form: no weight of an old example runs into zero. `u` is a hash of the request id and the
seed, so the sample depends neither on the order of the log nor on how it is cut.
"""

import hashlib
import heapq
import math

from tailrace.ids import RequestId
from training.examples import Example, Label


class Selection:
    """At most `max_fresh` fresh examples, the newest by event time, and at most `max_replay` of all others."""

    def __init__(self, *, max_fresh: int, max_replay: int, half_life_ms: float, seed: int) -> None:
        self._fresh = _Largest(max_fresh)
        self._replay = _Largest(max_replay)
        self._rate = math.log(2) / half_life_ms
        self._seed = seed.to_bytes(16, "little", signed=True)

    def wants(self, request_id: RequestId, at_ms: int, *, fresh: bool) -> bool:
        """Whether an example of this request would be kept as things stand: cheaper than making it in vain."""
        if fresh and self._fresh.wants((at_ms, request_id)):
            return True
        return self._replay.wants((self._priority(request_id, at_ms), request_id))

    def offer(self, example: Example, partition: int, *, fresh: bool) -> None:
        """Keeps the example, if it is among those to be kept. A fresh one that is not is sampled like an older one."""
        left_over: _Held | None = (partition, example)
        if fresh:
            left_over = self._fresh.push((example.at_ms, example.request_id), partition, example)
        if left_over is not None:
            partition, example = left_over
            self._replay.push(
                (self._priority(example.request_id, example.at_ms), example.request_id), partition, example
            )

    def settle(self, partition: int, label: Label) -> None:
        """Puts the labels on what is kept of a partition, and lets go of what `label` does not return."""
        self._fresh.settle(partition, label)
        self._replay.settle(partition, label)

    @property
    def fresh(self) -> list[Example]:
        """The fresh examples, oldest first."""
        return self._fresh.in_order()

    @property
    def replay(self) -> list[Example]:
        """The sample of the others, oldest first."""
        return self._replay.in_order()

    def _priority(self, request_id: RequestId, at_ms: int) -> float:
        digest = hashlib.blake2b(request_id.encode(), digest_size=8, key=self._seed).digest()
        uniform = (int.from_bytes(digest, "little") // 2**12 + 0.5) / 2**52  # never 0, never 1
        return self._rate * at_ms - math.log(-math.log(uniform))


_Held = tuple[int, Example]
_Key = tuple[float, RequestId]


class _Largest:
    """The examples with the `size` largest keys."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._keys: list[_Key] = []
        self._held: dict[RequestId, _Held] = {}

    def wants(self, key: _Key) -> bool:
        return len(self._keys) < self._size or (self._size > 0 and key > self._keys[0])

    def push(self, key: _Key, partition: int, example: Example) -> _Held | None:
        """Returns what is not kept: the example itself, the one it displaces, or nothing."""
        if not self.wants(key):
            return partition, example
        self._held[example.request_id] = (partition, example)
        if len(self._keys) < self._size:
            heapq.heappush(self._keys, key)
            return None
        return self._held.pop(heapq.heapreplace(self._keys, key)[1])

    def settle(self, partition: int, label: Label) -> None:
        of_partition = [example for number, example in self._held.values() if number == partition]
        labelled = label(of_partition)
        for example in of_partition:
            if example.request_id in labelled:
                self._held[example.request_id] = (partition, labelled[example.request_id])
            else:
                del self._held[example.request_id]
        self._keys = [key for key in self._keys if key[1] in self._held]
        heapq.heapify(self._keys)

    def in_order(self) -> list[Example]:
        kept = [example for _, example in self._held.values()]
        return sorted(kept, key=lambda example: (example.at_ms, example.request_id))
