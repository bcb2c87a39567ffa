"""How far the exported graphs stray from the torch model, on a fixed set of made-up texts, and how far they may.

Untrained, a click logit is the prior alone and would hide any damage to the BERT. So the vectors and the pooled upper
states are compared too, and ranks are compared on three scores: the cosine of user and item vectors (`retrieval`), the
pooled states along a fixed random direction (`states`), and the click logits.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import msgspec
import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer

from tailrace.errors import ParityError
from tailrace.model_card import RankerCard
from training.model import SplitRanker

PARITY_FILE = "parity.json"
NUM_USERS, NUM_ITEMS, TOP = 4, 32, 10

Array = NDArray[np.float32]
Feeds = Mapping[str, NDArray[np.generic]]
Run = Callable[[Feeds], Sequence[NDArray[np.generic]]]


class Tolerance(msgspec.Struct, frozen=True):
    """How far a precision may stray: mean and largest absolute difference, and the least rank correlation.

    Logits have no scale of their own: their differences are held against their own spread, where that is above 1.
    """

    vectors_mean: float
    vectors_max: float
    logits_mean: float
    logits_max: float
    ratings_max: float
    retrieval_spearman: float
    states_spearman: float
    click_spearman: float


TOLERANCES: Mapping[str, Tolerance] = {
    "onnx": Tolerance(1e-5, 1e-4, 1e-4, 1e-3, 1e-3, 0.9999, 0.9999, 0.9999),
    "fp32": Tolerance(1e-5, 1e-4, 1e-4, 1e-3, 1e-3, 0.9999, 0.9999, 0.9999),
    "fp16": Tolerance(5e-4, 5e-3, 1e-2, 5e-2, 2e-2, 0.999, 0.99, 0.99),
    "int8": Tolerance(1e-2, 1e-1, 1e-1, 1.0, 0.5, 0.9, 0.8, 0.95),
}


class Difference(msgspec.Struct, frozen=True):
    """Absolute difference to float32 torch."""

    mean: float
    max: float


class RankAgreement(msgspec.Struct, frozen=True):
    """Mean over users: Spearman over all candidates, Kendall over torch's top ten, share of the top ten kept."""

    spearman: float
    kendall_top10: float
    top10_kept: float


class PrecisionParity(msgspec.Struct, frozen=True):
    """One precision against float32 torch. `onnx` is the float32 graph before any conversion."""

    differences: dict[str, Difference]
    ranks: dict[str, RankAgreement]
    logit_scale: float
    tolerance: Tolerance


class ParityReport(msgspec.Struct, frozen=True):
    """What `parity.json` holds."""

    num_users: int
    num_items: int
    precisions: dict[str, PrecisionParity]


class Answers(msgspec.Struct, frozen=True):
    """What one implementation says of the fixed texts."""

    user_vectors: Array
    item_vectors: Array
    pooled_states: Array
    click_logits: Array
    ratings: Array


def measure_parity(
    ranker: SplitRanker, tokenizer: Tokenizer, graphs: Mapping[str, onnx.ModelProto], directory: Path, card: RankerCard
) -> ParityReport:
    """Returns how far the traced graphs and each precision written to `directory` stray from `ranker`."""
    users, items = made_up_texts()
    feeds = _tokens(tokenizer, users, "user", card.max_user_tokens) | _tokens(
        tokenizer, items, "item", card.max_item_tokens
    )
    drawn = np.random.default_rng(7).standard_normal((NUM_USERS, NUM_ITEMS, len(card.feature_names)))
    features = drawn * ranker.head.feature_std.numpy() + ranker.head.feature_mean.numpy()
    feeds["features"] = features.astype(np.float32)
    rng = np.random.default_rng(8)
    feeds["tag_worth"] = rng.standard_normal((NUM_USERS, NUM_ITEMS)).astype(np.float32)

    truth = _answer(_torch_runs(ranker), feeds)
    words = ranker.bert.words.weight.detach().numpy()
    found = {
        "onnx": _answer(
            {name: _run(graph.SerializeToString()) for name, graph in graphs.items()}, feeds | {"word_table": words}
        )
    }
    for precision in card.precisions:
        runs = {name: _run(str(directory / precision / f"{name}.onnx")) for name in graphs}
        found[precision] = _answer(runs, feeds)
    return ParityReport(
        NUM_USERS, NUM_ITEMS, {name: _compare(truth, answers, TOLERANCES[name]) for name, answers in found.items()}
    )


def require_parity(report: ParityReport) -> None:
    """Raises ParityError naming every figure that lies outside its tolerance."""
    outside = []
    for name, parity in report.precisions.items():
        allowed, found = parity.tolerance, parity.differences
        figures = [
            ("vectors mean", max(found["user_vectors"].mean, found["item_vectors"].mean), allowed.vectors_mean),
            ("vectors max", max(found["user_vectors"].max, found["item_vectors"].max), allowed.vectors_max),
            ("click logits mean", found["click_logits"].mean / parity.logit_scale, allowed.logits_mean),
            ("click logits max", found["click_logits"].max / parity.logit_scale, allowed.logits_max),
            ("click order", -parity.ranks["click"].spearman, -allowed.click_spearman),
            ("ratings max", found["ratings"].max, allowed.ratings_max),
            ("retrieval order", -parity.ranks["retrieval"].spearman, -allowed.retrieval_spearman),
            ("states order", -parity.ranks["states"].spearman, -allowed.states_spearman),
        ]
        # Written so that a NaN is outside.
        outside += [
            f"{name}: {what} {abs(value):.2g}, allowed {abs(most):.2g}"
            for what, value, most in figures
            if not value <= most
        ]
    if outside:
        raise ParityError("; ".join(outside))


def made_up_texts() -> tuple[list[str], list[str]]:
    """Returns user and item texts, always the same, in the manner of `tailrace.text`."""
    rng = random.Random(7)
    subjects = [
        "the sea",
        "small towns",
        "winter",
        "chess",
        "robots",
        "gardens",
        "a murder",
        "the moon",
        "trade",
        "jazz",
    ]
    kinds = ["novel", "essay", "film", "guide", "memoir", "comedy", "history", "thriller"]
    moods = ["quiet", "funny", "dark", "slow", "bright", "strange", "warm"]

    def title() -> str:
        return f"{rng.choice(moods)} {rng.choice(kinds)} of {rng.choice(subjects)}"

    items = [f"{title()}. tags: {rng.choice(kinds)}, {rng.choice(subjects)}. {title()}" for _ in range(NUM_ITEMS)]
    users = [
        f"evening on a phone; loved: {title()}, {title()}; disliked: {title()}; interests: {rng.choice(subjects)}"
        for _ in range(NUM_USERS)
    ]
    return users, items


def _tokens(tokenizer: Tokenizer, texts: Sequence[str], side: str, most: int) -> dict[str, NDArray[np.generic]]:
    ids = [encoding.ids for encoding in tokenizer.encode_batch(list(texts))]
    ids = [found if len(found) <= most else [*found[: most - 1], found[-1]] for found in ids]
    width = max(map(len, ids))
    tokens = np.zeros((len(ids), width), np.int64)
    mask = np.zeros((len(ids), width), np.int64)
    for row, found in enumerate(ids):
        tokens[row, : len(found)] = found
        mask[row, : len(found)] = 1
    return {f"{side}_tokens": tokens, f"{side}_mask": mask}


def _torch_runs(ranker: SplitRanker) -> dict[str, Run]:
    """Returns the three graphs as the torch model itself runs them."""
    encoded_users = ("user_keys", "user_values", "user_mask", "user_vectors")
    return {
        "user_encoder": _torch_run(ranker.encode_users, "user_tokens", "user_mask"),
        "item_encoder": _torch_run(ranker.encode_items, "item_tokens", "item_mask"),
        "scorer": _torch_run(ranker.score, *encoded_users, "item_states", "item_state_mask", "features", "tag_worth"),
    }


def _torch_run(method: Callable[..., tuple[torch.Tensor, ...]], *names: str) -> Run:
    def run(feeds: Feeds) -> Sequence[NDArray[np.generic]]:
        with torch.no_grad():
            outputs = method(*(torch.from_numpy(np.array(feeds[name])) for name in names))
        return [output.numpy() for output in outputs]

    return run


def _run(model: str | bytes) -> Run:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    wanted = [value.name for value in session.get_inputs()]

    def run(feeds: Feeds) -> Sequence[NDArray[np.generic]]:
        outputs: Sequence[NDArray[np.generic]] = session.run(None, {name: feeds[name] for name in wanted})
        return outputs

    return run


def _answer(runs: Mapping[str, Run], feeds: Feeds) -> Answers:
    """Returns what three graphs say, item states resting in float16 between them as they do in serving."""
    keys, values, user_vectors = runs["user_encoder"](feeds)
    states, state_mask, item_vectors = runs["item_encoder"](feeds)
    shape = (len(keys), *states.shape)
    logits, ratings, pooled = runs["scorer"](
        {
            "user_keys": keys,
            "user_values": values,
            "user_mask": feeds["user_mask"],
            "user_vectors": user_vectors,
            "item_states": np.broadcast_to(states.astype(np.float16).astype(np.float32), shape),
            "item_state_mask": np.broadcast_to(state_mask, shape[:3]),
            "features": feeds["features"],
            "tag_worth": feeds["tag_worth"],
        }
    )
    return Answers(*(np.asarray(found, np.float32) for found in (user_vectors, item_vectors, pooled, logits, ratings)))


def _compare(truth: Answers, found: Answers, tolerance: Tolerance) -> PrecisionParity:
    differences = {}
    for name in Answers.__struct_fields__:
        gap = np.abs(getattr(truth, name) - getattr(found, name))
        differences[name] = Difference(float(gap.mean()), float(gap.max()))
    ranks = {
        name: _agree(wanted, got)
        for (name, wanted), got in zip(_scores(truth).items(), _scores(found).values(), strict=True)
    }
    scale = max(float(truth.click_logits.std()), 1.0)
    return PrecisionParity(differences, ranks, scale, tolerance)


def _scores(answers: Answers) -> dict[str, Array]:
    direction = np.random.default_rng(11).standard_normal(answers.pooled_states.shape[-1:], np.float32)
    return {
        "retrieval": answers.user_vectors @ answers.item_vectors.T,
        "states": answers.pooled_states @ direction,
        "click": answers.click_logits,
    }


def _agree(wanted_BN: Array, got_BN: Array) -> RankAgreement:
    found = [_agree_one(wanted, got) for wanted, got in zip(wanted_BN, got_BN, strict=True)]
    spearman, kendall, kept = np.mean(found, axis=0)
    return RankAgreement(float(spearman), float(kendall), float(kept))


def _agree_one(wanted: Array, got: Array) -> tuple[float, float, float]:
    spearman = np.corrcoef(wanted.argsort().argsort(), got.argsort().argsort())[0, 1]
    top = (-wanted).argsort()[:TOP]
    pairs = np.triu_indices(len(top), 1)
    signs = [np.sign(scores[top][:, None] - scores[top][None, :])[pairs] for scores in (wanted, got)]
    kept = len(set(top) & set((-got).argsort()[:TOP])) / len(top)
    return float(spearman), float(np.mean(signs[0] * signs[1])), kept
