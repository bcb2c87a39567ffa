"""Impressions per second of fine-tuning: packed on the split ranker, against pairwise with full attention.

The same MiniLM, impressions and listwise loss in one run. Packed, a user is read once and 18 candidates meet them in
one pass; the states below the split are computed once, and that time counts too. Pairwise, the user is read again
with every candidate, through all layers, and all of them learn. Each round runs every variant once, on one thread, so
that a busy machine slows all of them; the figure is the median of the rounds.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from statistics import median

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from tokenizers import Tokenizer
from torch import Tensor

from tailrace.features import FEATURE_NAMES, PRIOR_WEIGHTS
from tailrace.ids import ItemId, ModelVersion, RequestId, UserId
from tailrace.settings import TrainingSettings
from tailrace.tastes import no_tastes
from tests.bench.ranker import ITEM_TEXT, ITEM_TOKENS, USER_TEXT, USER_TOKENS, Pairwise
from tests.bench.report import Row
from training.bert import PACKAGED, load_base
from training.course import compute_losses, make_optimizer, score_batch
from training.dataset import Corpus
from training.examples import Example
from training.learner import Learner
from training.lessons import Lesson
from training.losses import listwise_loss
from training.model import SplitRanker
from training.precision import Precision

NUM_IMPRESSIONS = 48
NUM_CANDIDATES = 18
BATCH = 16
PAIRWISE_IMPRESSIONS = 4  # a step of the slow baseline, and all that it is timed on
EPOCHS = 3  # passes over which reading once is spread
ROUNDS = 3
LEARNING = {0: "head alone", 1: "one layer", 3: "three layers"}
PRECISIONS: dict[str, Precision] = {"fp32": nullcontext, "bf16": partial(torch.autocast, "cpu", dtype=torch.bfloat16)}


def bench_training(console: Console) -> list[Row]:
    """Returns impressions per second and pass of each variant, and the packed lead over the faster pairwise one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        examples = [make_example(number) for number in range(NUM_IMPRESSIONS)]
        runs: dict[str, tuple[Callable[[], None], int]] = {}
        for precision_name, precision in PRECISIONS.items():
            for layers, name in LEARNING.items():
                runs[f"packed, {name}, {precision_name}"] = (
                    _packed_epochs(examples, layers, precision),
                    EPOCHS * NUM_IMPRESSIONS,
                )
            pairwise = _pairwise_step(examples[:PAIRWISE_IMPRESSIONS], precision)
            runs[f"pairwise, all layers, {precision_name}"] = pairwise, PAIRWISE_IMPRESSIONS
        rates = _measure(runs, console)
    finally:
        torch.set_num_threads(threads)

    rows: list[Row] = [
        {"name": f"fine-tuning {name}", "value": rate, "unit": "impressions/s"} for name, rate in rates.items()
    ]
    best = {
        kind: max(rate for name, rate in rates.items() if name.startswith(kind))
        for kind in ("pairwise", *(f"packed, {name}" for name in LEARNING.values()))
    }
    for name in LEARNING.values():
        lead = best[f"packed, {name}"] / best["pairwise"]
        rows.append({"name": f"fine-tuning packed, {name}, over pairwise", "value": lead, "unit": "times"})
    return rows


def _measure(runs: dict[str, tuple[Callable[[], None], int]], console: Console) -> dict[str, float]:
    rates: dict[str, list[float]] = {name: [] for name in runs}
    for run, _ in runs.values():
        run()
    for _ in track(range(ROUNDS), "measuring", console=console):
        for name, (run, count) in runs.items():
            started = time.perf_counter()
            run()
            rates[name].append(count / (time.perf_counter() - started))
    return {name: median(found) for name, found in rates.items()}


def make_example(number: int) -> Example:
    """Returns an impression whose user text has a length of its own, up to the longest that a model reads."""
    rng = np.random.default_rng(number)
    clicked = np.arange(NUM_CANDIDATES) == rng.integers(NUM_CANDIDATES)
    nothing = np.full(NUM_CANDIDATES, np.nan, np.float32)
    words = USER_TEXT.split()
    return Example(
        request_id=RequestId(f"r{number}"),
        user_id=UserId(f"u{number}"),
        at_ms=number,
        model_version=ModelVersion("bench"),
        user_text=" ".join(words[: rng.integers(len(words) // 3, len(words) + 1)]),
        item_ids=tuple(ItemId(f"i{item}") for item in range(NUM_CANDIDATES)),
        texts=tuple(ITEM_TEXT.format(one) for one in rng.integers(500, size=NUM_CANDIDATES)),
        num_shown=NUM_CANDIDATES,
        features_NF=rng.normal(size=(NUM_CANDIDATES, len(FEATURE_NAMES))).astype(np.float32),
        tastes=no_tastes(NUM_CANDIDATES),
        scores_N=np.zeros(NUM_CANDIDATES, np.float32),
        propensities_N=nothing,
        gains_N=clicked.astype(np.float32),
        clicked_N=clicked,
        ratings_N=nothing,
    )


def _packed_epochs(examples: Sequence[Example], layers: int, precision: Precision) -> Callable[[], None]:
    """Returns what reads the texts and then passes over the examples, as a fine-tune does."""
    settings = TrainingSettings(trainable_layers=layers)
    bert, tokenizer = load_base(PACKAGED)
    ranker = SplitRanker(bert, feature_names=FEATURE_NAMES, prior=PRIOR_WEIGHTS)
    first_layer = bert.shape.num_hidden_layers - layers
    learner = Learner(ranker, first_layer, num_positions=NUM_CANDIDATES, dropout=settings.dropout)
    optimizer = make_optimizer(learner, settings)

    def learn() -> None:
        corpus = Corpus(
            ranker,
            tokenizer,
            [Lesson(example) for example in examples],
            first_layer=first_layer,
            max_user_tokens=USER_TOKENS,
            max_item_tokens=ITEM_TOKENS,
            units=(np.zeros(len(FEATURE_NAMES)), np.ones(len(FEATURE_NAMES))),
            precision=precision,
            device=torch.device("cpu"),
        )
        learner.train()
        order = np.argsort(corpus.sizes, kind="stable").tolist()
        for start in [*range(0, len(order), BATCH)] * EPOCHS:
            chosen = order[start : start + BATCH]
            labels = corpus.labels(chosen)
            scores = score_batch(learner, corpus, chosen, labels, precision)
            losses = compute_losses(scores, labels, torch.zeros(labels.real.shape), settings)
            optimizer.zero_grad()
            losses["total"].backward()  # type: ignore[no-untyped-call]
            optimizer.step()

    return learn


def _pairwise_step(examples: Sequence[Example], precision: Precision) -> Callable[[], None]:
    """Returns one optimizer step of a cross-encoder over every pair of a user and a candidate."""
    bert, tokenizer = load_base(PACKAGED)
    model = Pairwise(bert).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5, fused=True)
    tokens, mask, token_types = _pair_tokens(tokenizer, examples)
    gains = torch.from_numpy(np.stack([example.gains_N for example in examples]))
    everything = torch.ones_like(gains, dtype=torch.bool)

    def step() -> None:
        with precision():
            scores = model(tokens, mask, token_types)
        logits = scores.float().reshape(gains.shape)
        loss = listwise_loss(logits, gains, everything, everything, unshown_weight=1.0)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step


def _pair_tokens(tokenizer: Tokenizer, examples: Sequence[Example]) -> tuple[Tensor, Tensor, Tensor]:
    """Returns user and item as one sequence for each pair, its mask, and which of the two a token belongs to."""
    tokenizer.no_padding()
    rows, sides = [], []
    for example in examples:
        tokenizer.enable_truncation(USER_TOKENS)
        user = tokenizer.encode(example.user_text).ids
        tokenizer.enable_truncation(ITEM_TOKENS)
        for item in tokenizer.encode_batch(list(example.texts)):
            rows.append(torch.tensor(user + item.ids[1:]))
            sides.append(torch.tensor([0] * len(user) + [1] * (len(item.ids) - 1)))
    pad = partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
    return pad(rows), pad([torch.ones_like(row) for row in rows]), pad(sides)
