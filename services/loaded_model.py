"""One version of the ranker, loaded: its scorer, what it has computed of every item, and its two work queues.

Everything that belongs to a version is behind one reference, so a swap is the change of that reference. Encoding
users and scoring candidates run on a thread each: with one ONNX Runtime thread per call, two callers use two cores
better than one caller with two threads.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from services.aside import Run, at_once
from services.batcher import Batcher
from services.encodings import Arrays, EncodedItems, ItemEncodings, cache_file, encoder_digest
from services.parts import Parts
from services.recently_used import RecentlyUsed
from services.scorer import EncodedUsers, Scorer
from services.tally import VersionTally
from tailrace.bundle import MODEL_CARD, Bundle, LooseBundle
from tailrace.catalogue import Catalogue
from tailrace.cosines import Floats
from tailrace.errors import BundleError, ScoringError, TooLate
from tailrace.features import FEATURE_NAMES
from tailrace.ids import ModelVersion
from tailrace.model_card import load_ranker_card, takes_our_input
from tailrace.settings import RankerSettings, Settings
from tailrace.tastes import Answers

_USER_CACHE_BYTES = 64 * 1024 * 1024
_QUERY_CACHE = 512

Value = TypeVar("Value")
Number = TypeVar("Number", bound=np.generic)


@dataclass(frozen=True)
class ScoreJob:
    """One request's candidates, to be scored for one user (B = 1)."""

    user: EncodedUsers
    items: EncodedItems
    features_NF: Floats
    tag_worth_N: Floats


class _EncodedTexts:
    """What an encoder of users has made of texts of late: of users, and of queries."""

    def __init__(self) -> None:
        self.users: RecentlyUsed[EncodedUsers] = RecentlyUsed(_USER_CACHE_BYTES)
        self.queries: RecentlyUsed[Floats] = RecentlyUsed(_QUERY_CACHE)


class LoadedModel:
    """Implements `recommender.TextModel`. After `retire` it ends with its last holder.

    Until `start` it has no threads: whatever it is asked is done where `run` does it, by one caller at a time.
    """

    def __init__(
        self,
        version: ModelVersion,
        precision: str,
        scorer: Scorer,
        encodings: ItemEncodings,
        encoded_texts: _EncodedTexts,
        settings: Settings,
        run: Run = at_once,
    ) -> None:
        self.version = version
        self.precision = precision
        self.encodings = encodings
        self.prior: Mapping[str, float] = scorer.card.prior
        self.tally = VersionTally()
        self.last_failure = ""
        self._scorer = scorer
        self._ranker = settings.ranker
        self._run = run
        self._queues: _Queues | None = None
        self._encoded_texts = encoded_texts
        self._holders = 0
        self._retired = False
        self._lock = Lock()

    @classmethod
    def load(cls, folder: Path, version: ModelVersion, settings: Settings) -> "LoadedModel":
        """Returns the model of a folder whose checksums the caller has verified. Raises BundleError as `open` does."""
        return cls.open(LooseBundle(folder), version, settings, Parts())

    @classmethod
    def open(
        cls, bundle: Bundle, version: ModelVersion, settings: Settings, parts: Parts, run: Run = at_once
    ) -> "LoadedModel":
        """Returns the model of a bundle, which shares with others what `parts` holds.

        Raises BundleError, also when it takes other input than we make.
        """
        ranker = settings.ranker
        precision = ranker.served_precision
        card = load_ranker_card(bundle.file(MODEL_CARD).parent)
        if tuple(card.feature_names) != FEATURE_NAMES or not takes_our_input(card):
            raise BundleError(f"{version} was trained on other features or text than this program makes")
        scorer = Scorer.open(
            bundle, parts, run, precision=precision, provider=ranker.device, intra_op_threads=ranker.intra_op_threads
        )
        encoder = encoder_digest(bundle, precision, "item_encoder", card.max_item_tokens)
        user_encoder = encoder_digest(bundle, precision, "user_encoder", card.max_user_tokens)

        def encode_nothing_yet() -> ItemEncodings:
            kept = cache_file(settings.path("cache") / "items", encoder) if ranker.item_text_cache else None
            return ItemEncodings(card.hidden_size, kept)

        encodings = parts.get(("item encodings", encoder), encode_nothing_yet)
        encoded_texts = parts.get(("encoded texts", user_encoder), _EncodedTexts)
        return cls(version, precision, scorer, encodings, encoded_texts, settings, run)

    def start(self) -> None:
        """Starts the model's threads: from here on any number of callers may ask at once."""
        if self._queues is None:
            self._queues = _Queues(self._run_encode, self._run_score, self._ranker)

    @property
    def waiting(self) -> int:
        """How many jobs wait in both queues."""
        queues = self._queues
        return 0 if queues is None else queues.encoding.waiting + queues.scoring.waiting

    @property
    def in_use(self) -> bool:
        """Whether a request holds the model."""
        return self._holders > 0

    def encode_user(self, text: str, deadline: float) -> EncodedUsers:
        """Returns the user's text as the model sees it (B = 1). Raises TooLate, Overloaded or ScoringError."""
        held = self._encoded_texts.users.get(text)
        if held is None:
            held = self._encode(text, deadline)
            self._encoded_texts.users.put(text, held, held.keys.nbytes + held.values.nbytes)
        return held

    def embed(self, text: str, deadline: float) -> Floats:
        """Returns float32 [D]: the unit vector of a text. Raises TooLate, Overloaded or ScoringError."""
        held = self._encoded_texts.queries.get(text)
        if held is None:
            held = self._encode(text, deadline).vectors_BD[0].copy()
            self._encoded_texts.queries.put(text, held, 1)
        return held

    def score(
        self, user: EncodedUsers, items: EncodedItems, features_NF: Floats, tag_worth_N: Floats, deadline: float
    ) -> tuple[Floats, Floats]:
        """Returns click logits [N] and ratings [N]. Raises TooLate, Overloaded or ScoringError."""
        job = ScoreJob(user, items, features_NF, tag_worth_N)
        if self._queues is None:
            clicks_N, ratings_N = self._run(lambda: self._run_score([job])[0])
        else:
            clicks_N, ratings_N = _wait(self._queues.scoring.submit(job, deadline), deadline)
        if not (np.isfinite(clicks_N).all() and np.isfinite(ratings_N).all()):
            raise self._failed("scores are not finite")
        return clicks_N, ratings_N

    def tag_worth(self, answers: Answers) -> Floats:
        """Returns float32 [V]: what a tag of each bucket adds to a click logit of the user with these answers."""
        return self._scorer.taste_model.worth(answers)

    def encode_items(self, texts: Sequence[str]) -> Arrays:
        """Returns states, mask and vectors of items with these texts; once started, runs in the caller's thread."""
        try:
            encode = self._run if self._queues is None else at_once
            encoded = encode(lambda: self._scorer.encode_items(texts))
        except Exception as error:  # ONNX Runtime's exceptions share no other base
            raise self._failed(f"encoding items failed: {error}") from error
        return encoded.states_NTH, encoded.mask_NT, encoded.vectors_ND

    def catch_up(self, catalogue: Catalogue) -> bool:
        """Encodes the newest changes of the catalogue, up to one chunk, and returns whether more wait."""
        return self.encodings.catch_up(self, catalogue)

    def hold(self) -> None:
        """Says that a request uses the model; `release` must follow."""
        with self._lock:
            self._holders += 1

    def release(self) -> None:
        """Says that a request is done with the model."""
        with self._lock:
            self._holders -= 1
        self._end_if_unused()

    def retire(self) -> None:
        """Says that no new request will come; the queues end when the last holder does."""
        self._retired = True
        self._end_if_unused()

    def _end_if_unused(self) -> None:
        with self._lock:
            unused = self._retired and self._holders == 0
        if unused and self._queues is not None:
            self._queues.stop()

    def _encode(self, text: str, deadline: float) -> EncodedUsers:
        if self._queues is None:
            encoded = self._run(lambda: self._run_encode([text])[0])
        else:
            encoded = _wait(self._queues.encoding.submit(text, deadline), deadline)
        if not np.isfinite(encoded.vectors_BD).all():
            raise self._failed("a user's vector is not finite")
        return encoded

    def _failed(self, why: str) -> ScoringError:
        """Returns the error to raise, and remembers it."""
        self.last_failure = why
        return ScoringError(f"{self.version}: {why}")

    def _run_encode(self, texts: list[str]) -> list[EncodedUsers]:
        try:
            users = self._scorer.encode_users(texts)
        except Exception as error:  # ONNX Runtime's exceptions share no other base
            raise self._failed(f"encoding a user failed: {error}") from error
        return [_one_user(users, index) for index in range(len(texts))]

    def _run_score(self, jobs: list[ScoreJob]) -> list[tuple[Floats, Floats]]:
        try:
            return self.score_together(jobs)
        except Exception as error:  # as above
            raise self._failed(f"scoring failed: {error}") from error

    def score_together(self, jobs: list[ScoreJob]) -> list[tuple[Floats, Floats]]:
        """Returns click logits and ratings of each job: padded to the largest of them and scored in one call."""
        clicks_BN, ratings_BN = self._scorer.score(
            _stack_users([job.user for job in jobs]),
            _stack_padded([job.items.states_NTH for job in jobs]),
            _stack_padded([job.items.mask_NT for job in jobs]),
            _stack_padded([job.features_NF for job in jobs]),
            _stack_padded([job.tag_worth_N for job in jobs]),
        )
        sizes = [len(job.features_NF) for job in jobs]
        return [(clicks_BN[index, :size], ratings_BN[index, :size]) for index, size in enumerate(sizes)]


class _Queues:
    """A model's two threads, and what waits for them."""

    def __init__(
        self,
        encode: Callable[[list[str]], list[EncodedUsers]],
        score: Callable[[list[ScoreJob]], list[tuple[Floats, Floats]]],
        ranker: RankerSettings,
    ) -> None:
        # int8 activations of one call share their scales, so on CPU each request is a call of its own: a user's scores
        # never depend on who else asks, and each is answered the moment it is done. A GPU computes in floats and is
        # only well used by several at once.
        most = ranker.max_batch_requests if ranker.device == "cuda" else 1
        room = ranker.max_queued_requests
        self.encoding = Batcher("encode", encode, max_batch=most, max_waiting=room)
        self.scoring = Batcher("score", score, max_batch=most, max_waiting=room)

    def stop(self) -> None:
        self.encoding.stop()
        self.scoring.stop()


def _wait(future: "Future[Value]", deadline: float) -> Value:
    try:
        return future.result(timeout=max(deadline - time.monotonic(), 0.0))
    except TimeoutError:
        future.cancel()
        raise TooLate("the model did not answer before the deadline") from None


def _one_user(users: EncodedUsers, index: int) -> EncodedUsers:
    one = slice(index, index + 1)
    return EncodedUsers(users.keys[one], users.values[one], users.mask[one], users.vectors_BD[one])


def _stack_users(users: list[EncodedUsers]) -> EncodedUsers:
    """Returns users encoded apart as one batch, padded on the right to the longest text."""
    if len(users) == 1:
        return users[0]
    widest = max(user.mask.shape[1] for user in users)
    padded = [(user, (0, widest - user.mask.shape[1])) for user in users]
    whole = (0, 0)
    return EncodedUsers(
        keys=np.concatenate([np.pad(user.keys, (whole, whole, whole, whole, more)) for user, more in padded]),
        values=np.concatenate([np.pad(user.values, (whole, whole, whole, more, whole)) for user, more in padded]),
        mask=np.concatenate([np.pad(user.mask, (whole, more)) for user, more in padded]),
        vectors_BD=np.concatenate([user.vectors_BD for user in users]),
    )


def _stack_padded(arrays: list[NDArray[Number]]) -> NDArray[Number]:
    """Returns arrays [N, ...] of several lengths as one [B, N, ...]; the last row of a shorter one is repeated."""
    most = max(len(array) for array in arrays)
    rows = [np.minimum(np.arange(most), len(array) - 1) for array in arrays]
    return np.stack([array if len(array) == most else array[row] for array, row in zip(arrays, rows, strict=True)])
