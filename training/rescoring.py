"""What a bundle says of logged candidates, scored as serving scores them, and how long it takes over it.

Knows no ONNX: `BundleScorer` is what `services.scorer.Scorer` is, handed in by whoever wires a round, since training
never imports services. One call per example, because int8 activations of a call share their scales.

Shapes: N candidates, F features, M distinct item texts, T states per item, H hidden size, D vector size.
"""

import statistics
import time
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from tailrace.features import utilities
from tailrace.tastes import TasteModel
from training.examples import Example

Floats = NDArray[np.float32]
Progress = Callable[[str, int, int], None]  # what is under way, done, in all

_TEXTS_PER_STEP = 128


class BundleScorer(Protocol):
    """What `services.scorer.Scorer` is: one version of the ranker at the precision that would serve."""

    @property
    def taste_model(self) -> TasteModel:
        """What it knows of tastes."""

    @property
    def encoders(self) -> tuple[Hashable, Hashable]:
        """What encodes users, and what encodes items: equal where two versions encode alike."""

    def encode_users(self, texts: Sequence[str]) -> Any:
        """Returns what scoring needs of the users with these texts, and their unit vectors `vectors_BD` float32."""

    def encode_items(self, texts: Sequence[str]) -> Any:
        """Returns `states_NTH` float16, `mask_NT` bool and unit vectors `vectors_ND` float32 of these texts."""

    def score(
        self,
        users: Any,
        states_BNTH: NDArray[np.floating],
        mask_BNT: NDArray[np.bool_],
        features_BNF: Floats,
        tag_worth_BN: Floats,
    ) -> tuple[Floats, Floats]:
        """Returns click logits [B,N] and ratings [B,N]."""

    def pool(self, users: Any, states_BNTH: NDArray[np.floating], mask_BNT: NDArray[np.bool_]) -> Floats:
        """Returns float32 [B,N,H]: what the head is given of candidates, on the way to `score`."""


@dataclass(frozen=True)
class ItemTable:
    """The distinct item texts of some examples as one bundle sees them, each encoded once."""

    row_of: dict[str, int]
    states_MTH: NDArray[np.float16]
    mask_MT: NDArray[np.bool_]
    vectors_MD: Floats

    def rows(self, texts: Sequence[str]) -> NDArray[np.int64]:
        """Returns the rows of these texts; every one must have been encoded."""
        return np.array([self.row_of[text] for text in texts], dtype=np.int64)


def encode_texts(
    scorer: BundleScorer, examples: Sequence[Example], progress: Progress | None = None, *, threads: int = 1
) -> ItemTable:
    """Returns the states and vectors of every candidate's text, states in float16 as serving keeps them."""
    texts = list(dict.fromkeys(text for example in examples for text in example.texts))
    steps = [texts[start : start + _TEXTS_PER_STEP] for start in range(0, max(len(texts), 1), _TEXTS_PER_STEP)]
    parts = []
    with ThreadPoolExecutor(threads) as pool:
        for part in pool.map(scorer.encode_items, steps):
            parts.append(part)
            if progress is not None:
                progress("encode items", min(len(parts) * _TEXTS_PER_STEP, len(texts)), len(texts))
    return ItemTable(
        row_of={text: row for row, text in enumerate(texts)},
        states_MTH=np.concatenate([part.states_NTH for part in parts]).astype(np.float16),
        mask_MT=np.concatenate([part.mask_NT for part in parts]),
        vectors_MD=np.concatenate([part.vectors_ND for part in parts]),
    )


def score_examples(
    scorer: BundleScorer,
    examples: Sequence[Example],
    *,
    rating_weight: float,
    items: ItemTable | None = None,
    progress: Progress | None = None,
    threads: int = 1,
) -> list[Floats]:
    """Returns float32 [N] per example: click logit + `rating_weight` * (rating - 3), the utility that serving ranks by.

    `items` are `encode_texts` of the same bundle, where they are there already. A logged impression holds fewer
    candidates than were ranked, so int8 scores differ from those served by quantization noise. `threads` examples are
    scored at a time, each as it would be alone.
    """
    table = encode_texts(scorer, examples, progress, threads=threads) if items is None else items
    return score_beside([(scorer, table)], examples, rating_weight=rating_weight, progress=progress, threads=threads)[0]


def score_beside(
    models: Sequence[tuple[BundleScorer, ItemTable]],
    examples: Sequence[Example],
    *,
    rating_weight: float,
    progress: Progress | None = None,
    threads: int = 1,
) -> list[list[Floats]]:
    """Returns by model what `score_examples` returns; users are encoded once for models that encode them alike."""
    first_alike = [
        next(index for index, (other, _) in enumerate(models) if other.encoders[0] == scorer.encoders[0])
        for scorer, _ in models
    ]

    def score(example: Example) -> list[Floats]:
        users = {index: models[index][0].encode_users([example.user_text]) for index in set(first_alike)}
        among = np.arange(len(example.texts))
        return [
            _score_one(scorer, table, example, users[alike], among, rating_weight)
            for (scorer, table), alike in zip(models, first_alike, strict=True)
        ]

    found: list[list[Floats]] = []
    with ThreadPoolExecutor(threads) as pool:
        for of_models in pool.map(score, examples):
            found.append(of_models)
            if progress is not None:
                progress("score", len(found), len(examples))
    return [[of_models[index] for of_models in found] for index in range(len(models))]


def latency_ratio(
    champion: tuple[BundleScorer, ItemTable],
    challenger: tuple[BundleScorer, ItemTable],
    examples: Sequence[Example],
    *,
    num_candidates: int = 200,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Returns how many times as long the challenger takes over a request: the median over the examples.

    Each example is timed on both in turn. A request is one user's text encoded and `num_candidates` scored, those of
    the example over and over. The first example warms both up, uncounted. Raises ValueError without examples.
    """
    if not examples:
        raise ValueError("no examples to time")
    ratios: list[float] = []
    for number, example in enumerate((examples[0], *examples)):
        took_s = []
        # Each goes first every other time, so neither always finds the caches warm.
        for scorer, table in (champion, challenger) if number % 2 else (challenger, champion):
            started = clock()
            users = scorer.encode_users([example.user_text])
            _score_one(scorer, table, example, users, np.resize(np.arange(len(example.texts)), num_candidates), 0.0)
            took_s.append(clock() - started)
        first, second = took_s
        ratios.append(second / first if number % 2 else first / second)
    return statistics.median(ratios[1:])


def _score_one(
    scorer: BundleScorer,
    table: ItemTable,
    example: Example,
    users: Any,
    among: NDArray[np.int64],
    rating_weight: float,
) -> Floats:
    if not example.texts:
        return np.zeros(0, np.float32)
    rows = table.rows(example.texts)[among]
    clicks_BN, ratings_BN = scorer.score(
        users,
        table.states_MTH[rows][None],
        table.mask_MT[rows][None],
        example.features_NF[among][None],
        scorer.taste_model.worth_of(example.tastes.among(among))[None],
    )
    return utilities(clicks_BN[0], ratings_BN[0], rating_weight).astype(np.float32)
