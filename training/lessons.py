"""What is learned from, and in what order. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from training.examples import Example

_POOL = 32  # batches whose examples are sorted by length together


@dataclass(frozen=True)
class Lesson:
    """An example, how much it weighs, and whether it is an older one that is replayed."""

    example: Example
    weight: float = 1.0
    replayed: bool = False

    @property
    def teaches(self) -> bool:
        """Whether something good happened, or somebody judged: such a slate says more than a silent one."""
        return bool(self.example.gains_N.any() or not np.isnan(self.example.ratings_N).all())


def plan_batches(lengths: Sequence[int], size: int, *, seed: int, epoch: int) -> list[list[int]]:
    """Returns the numbers of all examples in batches of like length, in an order that seed and epoch decide. Pure.

    >>> sorted(sum(plan_batches([5, 90, 5, 90], 2, seed=0, epoch=0), []))
    [0, 1, 2, 3]
    """
    rng = np.random.default_rng([seed, epoch])
    drawn = rng.permutation(len(lengths))
    length_E = np.asarray(lengths)
    pools = [drawn[start : start + size * _POOL] for start in range(0, len(drawn), size * _POOL)]
    sorted_pools = [pool[np.argsort(length_E[pool], kind="stable")] for pool in pools]
    batches = [pool[start : start + size].tolist() for pool in sorted_pools for start in range(0, len(pool), size)]
    return [batches[index] for index in rng.permutation(len(batches))]


def choose_lessons(
    train: Sequence[Example], replay: Sequence[Example], *, silent_share: float, seed: int
) -> list[Lesson]:
    """Returns what to learn from: every slate that teaches, and a share of the silent ones, which weigh more for it.

    A slate on which nothing happened has no say in the listwise loss; reading it costs as much as any other. So few
    are kept, each for as many as it stands for, and logits stay calibrated (He et al. 2014, "Practical lessons from
    predicting clicks on ads", there by a correction afterwards).
    """
    rng = np.random.default_rng([seed, len(train)])
    lessons = []
    for replayed, examples in ((False, train), (True, replay)):
        for example, draw in zip(examples, rng.random(len(examples)), strict=True):
            lesson = Lesson(example, replayed=replayed)
            if lesson.teaches or silent_share >= 1:
                lessons.append(lesson)
            elif draw < silent_share:
                lessons.append(Lesson(example, weight=1 / silent_share, replayed=replayed))
    return lessons
