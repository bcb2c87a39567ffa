"""A user's tastes and the items' tags as a ranker takes them: by bucket, so that it can learn which go together. Pure.

Whoever likes castles may like ghosts: no text says so, only what many users do. A model that keeps a weight for every
pair of tags can learn it. Tags are hashed into a fixed number of buckets (Weinberger et al. 2009, "Feature hashing for
large scale multitask learning"), so one nobody has seen before has a place as well, and no list of tags has to be
kept. Whoever changes a bucket, or how many there are, changes what every bundle has learned: FEATURE_VERSION must rise
with it.

Shapes: V buckets, N candidates, K tags of an item at most.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from tailrace.events import MOST_TASTES, TASTE_LIMIT
from tailrace.items import TAG, Item

BUCKETS = 512
NO_TAG = BUCKETS  # stands where an item has no further tag
MOST_TAGS = 8  # of an item; what comes after them is not looked at
TAG_WEIGHTS_FILE = "tag_weights.safetensors"
_DIGITS = 4

Floats = NDArray[np.float32]
TagBuckets = NDArray[np.int16]


@dataclass(frozen=True, slots=True)
class Tastes:
    """What a model is told of one user and N candidates: float32 [V] and int16 [N,K], padded with NO_TAG."""

    user_V: Floats
    tags_NK: TagBuckets

    def among(self, chosen: NDArray[np.integer]) -> "Tastes":
        """Returns the same of these candidates alone, in this order."""
        return Tastes(self.user_V, self.tags_NK[chosen])


@dataclass(frozen=True, slots=True)
class TagWeights:
    """What a model has learned of tags: `pairs_VV` of a taste and a tag, `single_V` of a tag whoever is asked."""

    pairs_VV: Floats
    single_V: Floats

    def worth(self, user_V: Floats) -> Floats:
        """Returns float32 [V]: what a tag of each bucket adds to a click logit of the user with these tastes."""
        result: Floats = user_V @ self.pairs_VV + self.single_V
        return result


def make_tastes(tastes: Mapping[str, float], tags_N: Sequence[Sequence[str]]) -> Tastes:
    """Returns the tastes of a user, by tag, and the tags of the candidates by bucket; a repeated tag counts once."""
    return Tastes(bucket_tastes(tastes), bucket_tags(tags_N))


def bucket_tastes(tastes: Mapping[str, float]) -> Floats:
    """Returns float32 [V]: the tastes of a user, by bucket."""
    user_V = np.zeros(BUCKETS, dtype=np.float32)
    for tag, taste in tastes.items():
        user_V[bucket(tag)] += taste
    return user_V


def bucket_tags(tags_N: Sequence[Sequence[str]]) -> TagBuckets:
    """Returns int16 [N,K]: the tags of items by bucket, each once, padded with NO_TAG."""
    tags_NK = np.full((len(tags_N), MOST_TAGS), NO_TAG, dtype=np.int16)
    for row, tags in enumerate(tags_N):
        found = [bucket(tag) for tag in dict.fromkeys(tags)][:MOST_TAGS]
        tags_NK[row, : len(found)] = found
    return tags_NK


def sum_worth(worth_V: Floats, tags_NK: TagBuckets) -> Floats:
    """Returns float32 [N]: what their tags add to the click logits of items, by the root of how many each has."""
    padded = np.append(worth_V, np.float32(0))
    result: Floats = padded[tags_NK].sum(1) / np.sqrt(np.maximum((tags_NK != NO_TAG).sum(1), 1), dtype=np.float32)
    return result


def no_tastes(count: int) -> Tastes:
    """Returns the tastes of somebody unknown among `count` candidates without tags."""
    return make_tastes({}, [()] * count)


def tags_of(item: Item) -> list[str]:
    """Returns the tags of an item that are looked at: the first few of those among its interest keys, each once."""
    facts = [fact.entity for fact in item.facts if f"{fact.relation}:" == TAG]  # their interest keys are the same
    return list(dict.fromkeys([*item.tags, *facts]))[:MOST_TAGS]


def strongest(tastes: Mapping[str, float]) -> dict[str, float]:
    """Returns the tastes that are kept of a user's: those ranked on and those logged are the very same.

    They are rounded, and cut at the limit of the log: a thousand clicks of one user on one item say no more than a few.

    >>> strongest({"gothic": 0.123456, "war": 0.0, "ghosts": 241.0})
    {'ghosts': 8.0, 'gothic': 0.1235}
    """
    kept = sorted(tastes, key=lambda tag: (-abs(tastes[tag]), tag))[:MOST_TASTES]
    cut = {tag: min(max(tastes[tag], -TASTE_LIMIT), TASTE_LIMIT) for tag in kept}
    return {tag: rounded for tag, taste in cut.items() if (rounded := round(taste, _DIGITS))}


@lru_cache(maxsize=65_536)
def bucket(tag: str) -> int:
    """Returns the bucket of a tag, 0 to BUCKETS - 1: the same in every process and for ever."""
    digest = hashlib.blake2b(tag.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % BUCKETS
