"""What a user made of tags, and how a ranker infers from it what each tag is worth to them.

Whoever likes castles may like ghosts: no text says so, only what many users do. So tastes are drawn from a normal
distribution over tags that training learns from the log (`training.taste_model`), and a user's is inferred from what
they were shown and clicked: a generalised linear mixed model (Zhang et al. 2016, "GLMix: generalized linear mixed
models for large-scale response prediction") whose random effects hang together, as in kriging.

Tags are hashed into buckets (Weinberger et al. 2009, "Feature hashing for large scale multitask learning"), many more
than a model knows tags, so that versions need no common list of them. Whoever changes a bucket, or how many there are,
changes what every bundle has learned: FEATURE_VERSION must rise with it.

Shapes: V buckets, E of them that a user has answered, T that a model knows, N candidates, K tags of an item at most.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from tailrace.errors import BundleError
from tailrace.events import MOST_ANSWERED, MOST_TAGS_ANSWERED, Answer
from tailrace.items import TAG, Item

BUCKETS = 16_384
NO_TAG = BUCKETS  # stands where an item has no further tag
MOST_TAGS = 8  # of an item; what comes after them is not looked at
TASTE_MODEL_FILE = "tastes.safetensors"
_LARGEST = 1e4  # of a number that training makes
_DIGITS = 4

Floats = NDArray[np.float32]
TagBuckets = NDArray[np.int16]


class Answers(NamedTuple):
    """What a user made of tags: which buckets, int16 [E], and how much of each was clicked and shown, float32 [E].

    An item with n tags counts 1 / sqrt(n) for each, as it does where the worths of its tags are summed.
    """

    met_E: TagBuckets
    clicked_E: Floats
    shown_E: Floats


@dataclass(frozen=True, slots=True)
class Tastes:
    """What a model is told of one user and N candidates, whose tags are `tags_NK`, padded with NO_TAG."""

    answers: Answers
    tags_NK: TagBuckets

    def among(self, chosen: NDArray[np.integer]) -> "Tastes":
        """Returns the same of these candidates alone, in this order."""
        return Tastes(self.answers, self.tags_NK[chosen])


@dataclass(frozen=True, slots=True, eq=False)
class TasteModel:
    """What is known of tastes before a user is: in click logits, what a tag is worth, and how that varies over users.

    `known_T` int16 are the buckets it knows, ascending; `mean_T` and `covariance_TT` are those of their worths.
    `rate_T` is how much is clicked of what is shown of a tag by somebody of middling taste, `information_T` how much
    that tells of its worth (the inverse of a variance, for each unit shown), and `together_TT` how far two tags, shown
    as they usually are, tell the same (a correlation). `gain` is how much of all that goes into a score. All float32.
    """

    known_T: TagBuckets
    mean_T: Floats
    covariance_TT: Floats
    rate_T: Floats
    information_T: Floats
    together_TT: Floats
    gain: float = 0.0

    @classmethod
    def ignorant(cls) -> Self:
        """Returns a model that knows no tag: none is worth anything, whatever a user clicks."""
        none_T, none_TT = np.zeros(0, np.float32), np.zeros((0, 0), np.float32)
        return cls(np.zeros(0, np.int16), none_T, none_TT, none_T, none_T, none_TT)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Returns the model of a file that `save` wrote. Raises BundleError, also for one that could not be used."""
        try:
            found = load_file(path)
            model = cls(
                found["known"],
                found["mean"],
                found["covariance"],
                found["rate"],
                found["information"],
                found["together"],
                found["gain"].item(),
            )
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise BundleError(f"{path}: {error}") from error
        if fault := model._fault():
            raise BundleError(f"{path}: {fault}")
        return model

    def save(self, path: Path) -> None:
        """Writes the model to a file."""
        found = {
            "known": self.known_T,
            "mean": self.mean_T,
            "covariance": self.covariance_TT,
            "rate": self.rate_T,
            "information": self.information_T,
            "together": self.together_TT,
            "gain": np.array([self.gain]),
        }
        save_file({name: np.ascontiguousarray(values) for name, values in found.items()}, path)

    def worth(self, answers: Answers) -> Floats:
        """Returns float32 [V]: what a tag of each bucket adds to a click logit of the user with these answers.

        The posterior mean, a tag's clicks beyond the usual being taken for a noisy sight of its worth.
        """
        worth_V = np.zeros(BUCKETS, np.float32)
        rows_E = np.searchsorted(self.known_T, answers.met_E)
        known_E = np.append(self.known_T, NO_TAG)[rows_E] == answers.met_E
        met_E, clicked_E, shown_E = rows_E[known_E], answers.clicked_E[known_E], answers.shown_E[known_E]
        surprise_E = clicked_E - self.rate_T[met_E] * shown_E
        root_E = np.sqrt(self.information_T[met_E] * shown_E.astype(np.float64))
        told_EE = root_E[:, None] * self.together_TT[np.ix_(met_E, met_E)] * root_E
        covariance_TE = self.covariance_TT[:, met_E].astype(np.float64)
        # With S the covariance and H what was told: (1/S + H)^-1 = S (1 + H S)^-1, so nothing is divided by nearly 0.
        system_EE = np.eye(len(met_E)) + told_EE @ covariance_TE[met_E]
        worth_V[self.known_T] = self.gain * (self.mean_T + covariance_TE @ np.linalg.solve(system_EE, surprise_E))
        return worth_V

    def worth_of(self, tastes: Tastes) -> Floats:
        """Returns float32 [N]: what their tags add to the click logits of candidates."""
        return sum_worth(self.worth(tastes.answers), tastes.tags_NK)

    def _fault(self) -> str:
        """Returns why the model could not be used, or nothing."""
        count, known_T = len(self.known_T), self.known_T
        if known_T.dtype != np.int16 or not (np.diff(np.r_[-1, known_T, BUCKETS].astype(int)) > 0).all():
            return "knows tags by other buckets than this program makes"
        of_tags, of_pairs = (self.mean_T, self.rate_T, self.information_T), (self.covariance_TT, self.together_TT)
        if [one.shape for one in (*of_tags, *of_pairs)] != [(count,)] * 3 + [(count, count)] * 2:
            return f"numbers are not those of {count} tags"
        numbers = (*of_tags, *of_pairs, np.array(self.gain))
        if not all(np.isfinite(one).all() and (np.abs(one) < _LARGEST).all() for one in numbers):
            return "numbers that no training makes"
        if (self.information_T < 0).any() or any(_indefinite(one) for one in of_pairs):
            return "variances below zero"
        return ""


def _indefinite(matrix_TT: Floats) -> bool:
    """Whether a matrix is no covariance, by more than rounding."""
    if not len(matrix_TT):
        return False
    lowest, highest = np.linalg.eigvalsh(matrix_TT.astype(np.float64))[[0, -1]]
    return not np.allclose(matrix_TT, matrix_TT.T) or bool(lowest < -1e-4 * highest)


def make_tastes(answers: Mapping[str, Answer], tags_N: Sequence[Sequence[str]]) -> Tastes:
    """Returns the answers of a user, by tag, and the tags of the candidates by bucket; a repeated tag counts once."""
    return Tastes(bucket_answers(answers), bucket_tags(tags_N))


def bucket_answers(answers: Mapping[str, Answer]) -> Answers:
    """Returns what a user made of tags by bucket; tags that share one are added up."""
    met_E, rows = np.unique(np.array([bucket(tag) for tag in answers], np.int16), return_inverse=True)
    sums_2E = np.zeros((2, len(met_E)))
    np.add.at(sums_2E.T, rows, np.array(list(answers.values())).reshape(-1, 2))
    return Answers(met_E, *sums_2E.astype(np.float32))


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
    result: Floats = padded[tags_NK].sum(-1) / np.sqrt(np.maximum((tags_NK != NO_TAG).sum(-1), 1), dtype=np.float32)
    return result


def no_tastes(count: int) -> Tastes:
    """Returns the tastes of somebody unknown among `count` candidates without tags."""
    return make_tastes({}, [()] * count)


def tags_of(item: Item) -> list[str]:
    """Returns the tags of an item that are looked at: the first few of those among its interest keys, each once."""
    facts = [fact.entity for fact in item.facts if f"{fact.relation}:" == TAG]  # their interest keys are the same
    return list(dict.fromkeys([*item.tags, *facts]))[:MOST_TAGS]


def most_answered(answers: Mapping[str, Answer]) -> dict[str, Answer]:
    """Returns the answers that are kept of a user's, of most showings: those ranked on and those logged are the same.

    They are rounded, and cut at the limit of the log: a thousand showings say no more than some hundreds.

    >>> most_answered({"gothic": (0.123456, 2.0), "war": (0.0, 0.0), "ghosts": (1.0, 3.0)})
    {'ghosts': (1.0, 3.0), 'gothic': (0.1235, 2.0)}
    """
    kept = sorted(answers, key=lambda tag: (-answers[tag][1], tag))[:MOST_TAGS_ANSWERED]
    found: dict[str, Answer] = {}
    for tag in kept:
        clicked, shown = answers[tag]
        part = min(MOST_ANSWERED / shown, 1.0) if shown else 0.0
        if answered := round(part * shown, _DIGITS):
            found[tag] = round(part * clicked, _DIGITS), answered
    return found


@lru_cache(maxsize=65_536)
def bucket(tag: str) -> int:
    """Returns the bucket of a tag, 0 to BUCKETS - 1: the same in every process and for ever."""
    digest = hashlib.blake2b(tag.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % BUCKETS
