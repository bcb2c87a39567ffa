"""Candidates per second of the one-way split ranker along its dial, against a pairwise cross-encoder on the same text.

Everything is int8 on the CPU, in one run: each round measures every variant once, so that a busy machine slows all of
them, and the figure is the median of the rounds. The pairwise baseline is the same BERT over "user [SEP] item",
quantized by the same code; ONNX Runtime's transformer optimizer (QAttention) was tried on it and was not faster.
"""

import tempfile
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from statistics import median

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from tokenizers import Tokenizer
from torch import Tensor, nn

from services.scorer import EncodedItems, Scorer
from tailrace.ids import ModelVersion
from tests.bench.report import Row
from training.bert import PACKAGED, Bert, load_base
from training.export import export_bundle
from training.graphs import quantize_graph, trace_graph
from training.model import SplitRanker

USER_TOKENS, ITEM_TOKENS = 96, 24
NUM_CANDIDATES = 200
NUM_PAIRS = 32  # enough to time the slow baseline
ROUNDS = 5
THREADS = (1, 2)
MICRO_BATCHES = (4, 8)
DIAL = {"k=0, all tokens": (0, 0), "k=3, all tokens": (3, 0), "k=3, T=4": (3, 4), "k=3, T=1": (3, 1)}
FEATURE_NAMES = tuple(f"feature_{number}" for number in range(40))

USER_TEXT = (
    "saturday evening, on a phone, at home; looking for something to read on a long train journey; loved: the quiet "
    "harbour, letters from the north, a year in the garden; liked: the clockmaker's apprentice, bread and salt, night "
    "trains of europe; fine: the chess player; disliked: murder at the vicarage, how to win at anything; interests: "
    "travel writing, gardens, the sea, letters, translated novels, history of science, cookery of the south"
)
ITEM_TEXT = (
    "The Lighthouse Keeper's Year number {}. tags: memoir, the sea, solitude. written by a keeper on a far island, "
    "with storms, birds and books"
)


class Pairwise(nn.Module):
    """A cross-encoder: user and item in one sequence, the first token's top state to a score."""

    def __init__(self, bert: Bert) -> None:
        super().__init__()
        self.bert = bert
        self.score = nn.Linear(bert.shape.hidden_size, 1)

    def forward(self, tokens: Tensor, mask: Tensor, token_types: Tensor) -> Tensor:
        bert = self.bert
        embedded = bert.words(tokens) + bert.positions.weight[: tokens.shape[1]] + bert.token_types(token_types)
        states = bert.norm(embedded)
        bias = ((1 - mask).float() * -1e4).unsqueeze(1).unsqueeze(1)
        for layer in bert.stack:
            states = layer(states, *layer.project(states), bias)
        scores: Tensor = self.score(states[:, 0])
        return scores


def bench_ranker(console: Console) -> list[Row]:
    """Returns candidates per second of each variant, and the split ranker's lead over the best pairwise variant."""
    items = [ITEM_TEXT.format(number) for number in range(NUM_CANDIDATES)]
    variants: dict[str, tuple[Callable[[], object], int]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for (name, (split_layer, item_states)), threads in product(DIAL.items(), THREADS):
            bundle = Path(folder) / f"{split_layer}-{item_states}"
            if not bundle.exists():
                console.print(f"exporting {name}")
                _export(bundle, split_layer, item_states)
            scorer = Scorer.load(bundle, precision="int8", intra_op_threads=threads)
            encoded = scorer.encode_items(items)
            label = f"{name}, {_threads(threads)}"
            variants[f"ranker {label}"] = (_request(scorer, encoded), NUM_CANDIDATES)
            variants[f"ranker {label}, user already encoded"] = (_scoring(scorer, encoded), NUM_CANDIDATES)
        console.print("exporting the pairwise baseline")
        graph = _export_pairwise(Path(folder))
        for threads, size in product(THREADS, MICRO_BATCHES):
            name = f"pairwise, {_threads(threads)}, micro-batch {size}"
            variants[name] = (_pairwise(graph, items[:NUM_PAIRS], threads, size), NUM_PAIRS)
        rates = _measure(variants, console)

    rows: list[Row] = [{"name": name, "value": rate, "unit": "candidates/s"} for name, rate in rates.items()]
    best = max(rate for name, rate in rates.items() if name.startswith("pairwise"))
    for name in DIAL:
        lead = max(rates[f"ranker {name}, {_threads(threads)}"] for threads in THREADS) / best
        rows.append({"name": f"ranker {name}, over the best pairwise", "value": lead, "unit": "times"})
    return rows


def _threads(count: int) -> str:
    return f"{count} thread" if count == 1 else f"{count} threads"


def _measure(variants: dict[str, tuple[Callable[[], object], int]], console: Console) -> dict[str, float]:
    rates: dict[str, list[float]] = {name: [] for name in variants}
    for run, _ in variants.values():
        run()
    for _ in track(range(ROUNDS), "measuring", console=console):
        for name, (run, count) in variants.items():
            started = time.perf_counter()
            run()
            rates[name].append(count / (time.perf_counter() - started))
    return {name: median(found) for name, found in rates.items()}


def _export(bundle: Path, split_layer: int, item_states: int) -> None:
    bert, tokenizer = load_base(PACKAGED)
    ranker = SplitRanker(
        bert, split_layer=split_layer, item_states=item_states, feature_names=FEATURE_NAMES, prior={"feature_0": 1.0}
    )
    export_bundle(
        ranker,
        tokenizer,
        bundle,
        version=ModelVersion("bench"),
        max_user_tokens=USER_TOKENS,
        max_item_tokens=ITEM_TOKENS,
        precisions=("int8",),
    )


def _export_pairwise(folder: Path) -> Path:
    example = torch.ones(2, 5, dtype=torch.int64)
    axes = {0: "B", 1: "M"}
    names = ("tokens", "mask", "token_types")
    module = Pairwise(load_base(PACKAGED)[0])
    graph = trace_graph(module, (example,) * 3, names, {"scores": {0: "B"}}, dict.fromkeys(names, axes))
    path = folder / "pairwise.onnx"
    path.write_bytes(quantize_graph(graph).SerializeToString())
    return path


def _scoring(scorer: Scorer, items: EncodedItems) -> Callable[[], object]:
    users = scorer.encode_users([USER_TEXT])
    assert users.mask.shape[1] == USER_TOKENS
    numbers = _numbers()
    return lambda: scorer.score(users, items.states_NTH[None], items.mask_NT[None], *numbers)


def _request(scorer: Scorer, items: EncodedItems) -> Callable[[], object]:
    numbers = _numbers()
    return lambda: scorer.score(scorer.encode_users([USER_TEXT]), items.states_NTH[None], items.mask_NT[None], *numbers)


def _numbers() -> tuple[np.ndarray, ...]:
    features = np.zeros((1, NUM_CANDIDATES, len(FEATURE_NAMES)), np.float32)
    return features, np.zeros((1, NUM_CANDIDATES), np.float32)


def _pairwise(graph: Path, items: list[str], threads: int, size: int) -> Callable[[], object]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    tokenizer = load_base(PACKAGED)[1]

    def run() -> None:
        feeds = _pair_tokens(tokenizer, items)
        for start in range(0, len(items), size):
            session.run(None, {name: rows[start : start + size] for name, rows in feeds.items()})

    return run


def _pair_tokens(tokenizer: Tokenizer, items: list[str]) -> dict[str, NDArray[np.int64]]:
    """Returns what the split ranker sees of user and item, as one sequence; the item has no opening token."""
    tokenizer.no_padding()
    tokenizer.enable_truncation(USER_TOKENS)
    user = tokenizer.encode(USER_TEXT).ids
    tokenizer.enable_truncation(ITEM_TOKENS)
    tokens = np.array([user + encoding.ids[1:] for encoding in tokenizer.encode_batch(items)], np.int64)
    token_types = np.zeros_like(tokens)
    token_types[:, len(user) :] = 1
    return {"tokens": tokens, "mask": np.ones_like(tokens), "token_types": token_types}
