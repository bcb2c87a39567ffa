"""Doubles that say what they do. They stand in for what a test is not about, never for what it checks."""

import threading
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np

from services.bodies import Asked, ModelStatus
from services.encodings import Arrays, EncodedItems, ItemEncodings
from services.pages import SimilarItem
from tailrace.catalogue import Catalogue
from tailrace.cosines import Floats
from tailrace.errors import TailraceError
from tailrace.features import PRIOR_WEIGHTS
from tailrace.ids import ItemId, ModelVersion
from tailrace.tastes import Answers, TasteModel


class FakeClock:
    """A clock that stands still until it is told to move. Seconds."""

    def __init__(self, now: float = 1000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


class WordVectors:
    """Encodes a text as a bag of its words in 64 dimensions: texts that share words are near. One state per item."""

    SIZE = 64

    def vector(self, text: str) -> Floats:
        vector = np.zeros(self.SIZE, dtype=np.float32)
        for word in text.lower().replace(";", " ").replace(".", " ").replace(",", " ").split():
            vector[sum(word.encode()) % self.SIZE] += 1.0
        unit: Floats = vector / max(float(np.linalg.norm(vector)), 1e-9)
        return unit

    def encode_items(self, texts: Sequence[str]) -> Arrays:
        vectors = np.stack([self.vector(text) for text in texts])
        return vectors[:, None, :].astype(np.float16), np.ones((len(texts), 1), dtype=np.bool_), vectors


class EncodedWords:
    """A user as WordVectors sees them."""

    def __init__(self, vector: Floats) -> None:
        self.vectors_BD = vector[None]


class WordModel:
    """A `recommender.TextModel` without a model: scores are cosines of shared words. `failure` is raised instead."""

    def __init__(self, catalogue: Catalogue, version: str = "words") -> None:
        self.version = ModelVersion(version)
        self.encodings = ItemEncodings(WordVectors.SIZE)
        self.prior = PRIOR_WEIGHTS
        self.taste_model = TasteModel.ignorant()
        self.encode_failure: TailraceError | None = None
        self.score_failure: TailraceError | None = None
        self.user_texts: list[str] = []
        self.answers: list[Answers] = []
        self.tag_worths: list[Floats] = []
        self.scored_texts: list[list[str]] = []
        self._words = WordVectors()
        while self.encodings.catch_up(self._words, catalogue):
            pass

    def tag_worth(self, answers: Answers) -> Floats:
        self.answers.append(answers)
        return self.taste_model.worth(answers)

    def encode_user(self, text: str, deadline: float) -> EncodedWords:
        self.user_texts.append(text)
        if self.encode_failure is not None:
            raise self.encode_failure
        return EncodedWords(self._words.vector(text))

    def embed(self, text: str, deadline: float) -> Floats:
        return self._words.vector(text)

    def score(
        self, user: Any, items: EncodedItems, features_NF: Floats, tag_worth_N: Floats, deadline: float
    ) -> tuple[Floats, Floats]:
        self.tag_worths.append(tag_worth_N)
        self.scored_texts.append(items.texts_N)
        if self.score_failure is not None:
            raise self.score_failure
        clicks: Floats = items.vectors_ND @ user.vectors_BD[0]
        return clicks, np.full(len(clicks), 3.0, dtype=np.float32)


class FixedRanker:
    """A `ranker_client.RankerClient` that gives one answer, or fails in one way. Counts how often it was asked."""

    def __init__(self, answer: bytes = b"", failure: TailraceError | None = None) -> None:
        self.answer = answer
        self.failure = failure
        self.asked = 0
        self.last_bytes = b""
        self.serving: ModelVersion | None = ModelVersion("fixed")

    async def rank(self, asked: bytes, timeout_s: float) -> bytes:
        self.asked += 1
        self.last_bytes = asked
        if self.failure is not None:
            raise self.failure
        return self.answer

    def last_asked(self) -> Asked:
        return msgspec.msgpack.decode(self.last_bytes, type=Asked)

    async def similar(self, item_id: ItemId, n: int, timeout_s: float) -> list[SimilarItem]:
        if self.failure is not None:
            raise self.failure
        return [SimilarItem(item_id=ItemId("near"), title="Near", score=0.9)]

    async def statuses(self, timeout_s: float) -> list[ModelStatus]:
        if self.failure is not None:
            raise self.failure
        return [
            ModelStatus(
                serving=self.serving,
                precision="int8",
                loading=None,
                refused={},
                items=1,
                pending=0,
                waiting=0,
                swaps=1,
            )
        ]


class Gate:
    """Holds whoever passes through `wait` until `open` is called; `reached` says that someone has come."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self._open = threading.Event()

    def wait(self) -> None:
        self.reached.set()
        assert self._open.wait(10), "nobody opened the gate"

    def open(self) -> None:
        self._open.set()
