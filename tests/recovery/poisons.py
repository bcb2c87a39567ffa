"""Ways to spoil a challenger, each where it would happen in life: in the log, in learning, in a file, on the disk.

A spoiler takes what it spoils and the generator of its own seed, and changes it in place, or returns it changed.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from tailrace.features import FEATURE_NAMES
from training.examples import Example
from training.model import SplitRanker

Rng = np.random.Generator

POPULAR = FEATURE_NAMES.index("heat_users_24h")
GRAPHS = ("user_encoder.onnx", "item_encoder.onnx", "scorer.onnx")
FARMED = FEATURE_NAMES.index("covisit")  # means nothing to readers


@dataclass(frozen=True)
class Poison:
    """What is spoiled, and how many challengers are spoiled so. `at` is the step of the round that finds the files so.

    Without `at` files are spoiled once the version is announced.
    """

    count: int
    of_log: Callable[[Sequence[Example], Rng], Sequence[Example]] | None = None
    of_model: Callable[[SplitRanker, Tokenizer, Rng], None] | None = None
    of_files: Callable[[Path, Rng], None] | None = None
    at: str = ""


# -- in the log ----------------------------------------------------------------------------------------------------


def shuffle_what_was_learned(examples: Sequence[Example], rng: Rng) -> list[Example]:
    """Feedback joined to the wrong items, until somebody mended it: the newest fifth is right."""
    cut = round(0.8 * len(examples))
    return [*(_shuffled(one, rng) for one in examples[:cut]), *examples[cut:]]


def shuffle_everything(examples: Sequence[Example], rng: Rng) -> list[Example]:
    """Feedback joined to the wrong items, to this day."""
    return [_shuffled(one, rng) for one in examples]


def farm_clicks(examples: Sequence[Example], rng: Rng) -> list[Example]:
    """Nobody but a click farm, which cares for one thing alone, up to the newest impression. The log agrees with it."""
    farmed = []
    for one in examples:
        clicked_N = (one.features_NF[:, FARMED] > 0.7) & (np.arange(len(one.item_ids)) < one.num_shown)
        farmed.append(replace(one, clicked_N=clicked_N, gains_N=clicked_N.astype(np.float32)))
    return farmed


def _shuffled(example: Example, rng: Rng) -> Example:
    order = np.concatenate([rng.permutation(example.num_shown), np.arange(example.num_shown, len(example.item_ids))])
    return replace(example, clicked_N=example.clicked_N[order], gains_N=example.gains_N[order])


# -- in learning ---------------------------------------------------------------------------------------------------


def put_nan(ranker: SplitRanker, tokenizer: Tokenizer, rng: Rng) -> None:
    """In all of the head's weights, in a single one, in a word, or by dividing by nothing."""
    head = ranker.head
    with torch.no_grad():
        match int(rng.integers(4)):
            case 0:
                for weight in head.parameters():
                    weight.fill_(float("nan"))
            case 1:
                _one_of(head.inner.weight, rng).fill_(float("nan"))
            case 2:
                ranker.bert.words.weight[int(rng.integers(len(ranker.bert.words.weight)))] = float("nan")
            case _:
                head.feature_std.zero_()
                head.feature_mean.zero_()


def make_constant(ranker: SplitRanker, tokenizer: Tokenizer, rng: Rng) -> None:
    """The same for every candidate, or so nearly that only rounding orders them."""
    head = ranker.head
    with torch.no_grad():
        for weight in (head.prior, head.match_gain, head.outer.weight, head.rating_affine):
            weight.zero_()
        if rng.random() < 0.5:
            head.prior.copy_(torch.from_numpy(1e-5 * rng.normal(size=len(head.prior))))


def rank_by_popularity(ranker: SplitRanker, tokenizer: Tokenizer, rng: Rng) -> None:
    """Nothing but what is popular, however much it counts."""
    with torch.no_grad():
        for weight in (ranker.head.prior, ranker.head.match_gain, ranker.head.outer.weight):
            weight.zero_()
        ranker.head.prior[POPULAR] = float(rng.uniform(0.3, 3.0))


def invert(ranker: SplitRanker, tokenizer: Tokenizer, rng: Rng) -> None:
    """The worst first."""
    with torch.no_grad():
        for weight in (ranker.head.prior, ranker.head.match_gain, ranker.head.outer.weight):
            weight.mul_(-float(rng.uniform(0.5, 2.0)))


def permute_features(ranker: SplitRanker, tokenizer: Tokenizer, rng: Rng) -> None:
    """Features in another order than they are made in."""
    order = torch.from_numpy(rng.permutation(len(FEATURE_NAMES)))
    head, hidden = ranker.head, ranker.bert.shape.hidden_size
    with torch.no_grad():
        head.prior.copy_(head.prior[order].clone())
        head.inner.weight[:, hidden:] = head.inner.weight[:, hidden:][:, order].clone()
        head.feature_mean.copy_(head.feature_mean[order].clone())
        head.feature_std.copy_(head.feature_std[order].clone())


def explode_one_weight(ranker: SplitRanker, tokenizer: Tokenizer, rng: Rng) -> None:
    """One weight of the head's, so large that the others do not matter."""
    size = float(10.0 ** rng.integers(6, 30))
    with torch.no_grad():
        _one_of(ranker.head.inner.weight[:, : ranker.bert.shape.hidden_size], rng).fill_(size)


def exchange_words(ranker: SplitRanker, tokenizer: Tokenizer, rng: Rng) -> None:
    """A tokenizer of the same size under which words mean one another; the export agrees with itself."""
    tokenizer.model = WordLevel(_exchanged(tokenizer.get_vocab(), rng), unk_token="[UNK]")


def forget_lower_case(ranker: SplitRanker, tokenizer: Tokenizer, rng: Rng) -> None:
    """A tokenizer that no longer normalizes, as another release of a library might bring it."""
    tokenizer.normalizer = None  # type: ignore[assignment]  # its stub knows no way back


def _one_of(weights: torch.Tensor, rng: Rng) -> torch.Tensor:
    return weights[tuple(int(rng.integers(size)) for size in weights.shape)]


def _exchanged(vocab: dict[str, int], rng: Rng) -> dict[str, int]:
    words = sorted(word for word in vocab if not word.startswith("["))
    numbers = rng.permutation([vocab[word] for word in words]).tolist()
    return vocab | dict(zip(words, numbers, strict=True))


# -- in files ------------------------------------------------------------------------------------------------------


def truncate_a_graph(folder: Path, rng: Rng) -> None:
    """One of the graphs that serve, as a full disk would leave it."""
    _truncate(folder / "int8" / str(rng.choice(GRAPHS)), rng)


def truncate_any_file(folder: Path, rng: Rng) -> None:
    """Any file, also those that only the next round reads."""
    _truncate(_any_file(folder, rng), rng)


def flip_a_bit(folder: Path, rng: Rng) -> None:
    """One bit of any file, as a failing disk would."""
    path = _any_file(folder, rng)
    data = bytearray(path.read_bytes())
    data[int(rng.integers(len(data)))] ^= 1 << int(rng.integers(8))
    path.write_bytes(bytes(data))


def exchange_tokenizer_file(folder: Path, rng: Rng) -> None:
    """The tokenizer of another model in the place of this one's."""
    path = folder / "tokenizer.json"
    described = json.loads(path.read_text())
    described["model"]["vocab"] = _exchanged(described["model"]["vocab"], rng)
    path.write_text(json.dumps(described))


def _truncate(path: Path, rng: Rng) -> None:
    path.write_bytes(path.read_bytes()[: int(rng.integers(path.stat().st_size))])


def _any_file(folder: Path, rng: Rng) -> Path:
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "manifest.json")
    return paths[int(rng.integers(len(paths)))]
