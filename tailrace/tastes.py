"""A user's tastes and the items' tags as a ranker takes them: by bucket, so that it can learn which go together. Pure.

Whoever likes castles may like ghosts: no text says so, only what many users do. A model that keeps a weight for every
pair of tags can learn it. Tags are hashed into a fixed number of buckets (Weinberger et al. 2009, "Feature hashing for
large scale multitask learning"), so one nobody has seen before has a place as well, and no list of tags has to be kept.

Shapes: V buckets, N candidates, K tags of an item at most.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

BUCKETS = 512
NO_TAG = BUCKETS  # stands where an item has no further tag
MOST_TAGS = 8  # of an item; what comes after them is not looked at
_MOST_TASTES = 64  # of a user: the strongest
_DIGITS = 4

Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Tastes:
    """What a model is told of one user and N candidates: float32 [V] and int64 [N,K], padded with NO_TAG."""

    user_V: Floats
    tags_NK: NDArray[np.int64]

    def among(self, chosen: NDArray[np.integer]) -> "Tastes":
        """Returns the same of these candidates alone, in this order."""
        return Tastes(self.user_V, self.tags_NK[chosen])


def make_tastes(tastes: Mapping[str, float], tags_N: Sequence[Sequence[str]]) -> Tastes:
    """Returns the tastes of a user, by tag, and the tags of the candidates by bucket."""
    user_V = np.zeros(BUCKETS, dtype=np.float32)
    for tag, taste in tastes.items():
        user_V[bucket(tag)] += taste
    tags_NK = np.full((len(tags_N), MOST_TAGS), NO_TAG, dtype=np.int64)
    for row, tags in enumerate(tags_N):
        found = [bucket(tag) for tag in tags[:MOST_TAGS]]
        tags_NK[row, : len(found)] = found
    return Tastes(user_V, tags_NK)


def no_tastes(count: int) -> Tastes:
    """Returns the tastes of somebody unknown among `count` candidates without tags."""
    return make_tastes({}, [()] * count)


def strongest(tastes: Mapping[str, float]) -> dict[str, float]:
    """Returns the tastes that are kept of a user's, rounded: those ranked on and those logged are the very same.

    >>> strongest({"gothic": 0.123456, "war": 0.0})
    {'gothic': 0.1235}
    """
    kept = sorted(tastes, key=lambda tag: (-abs(tastes[tag]), tag))[:_MOST_TASTES]
    return {tag: rounded for tag in kept if (rounded := round(tastes[tag], _DIGITS))}


@lru_cache(maxsize=65_536)
def bucket(tag: str) -> int:
    """Returns the bucket of a tag, 0 to BUCKETS - 1: the same in every process and for ever."""
    digest = hashlib.blake2b(tag.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % BUCKETS
