"""From a ranker in torch to the files that serve it, and from nothing to version 0.

<directory>/
    int8/  fp16/         user_encoder.onnx  item_encoder.onnx  scorer.onnx  words.bin
    tokenizer.json       the text half of model input
    weights.safetensors  the torch weights, for a warm start
    tastes.safetensors   what is known of tastes before a user is (`tailrace.tastes.TasteModel`)
    model.json           the card: shapes, feature names, prior
    parity.json          how far each precision strays from torch
    manifest.json        added by the registry, last
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from tailrace.bundle import FileEntry, sum_files
from tailrace.errors import BundleError
from tailrace.features import hash_features
from tailrace.ids import ModelVersion
from tailrace.model_card import RankerCard, load_ranker_card, save_ranker_card
from tailrace.tastes import TASTE_MODEL_FILE, TasteModel
from tailrace.text import TEXT_VERSION
from training.bert import PACKAGED, Bert, BertShape, load_base
from training.graphs import Precision, save_graphs, trace_graphs
from training.model import SplitRanker
from training.parity import PARITY_FILE, ParityReport, measure_parity, require_parity

WEIGHTS_FILE = "weights.safetensors"
TOKENIZER_FILE = "tokenizer.json"
DEFAULT_PRECISIONS: tuple[Precision, ...] = ("int8", "fp16")

Progress = Callable[[str, int, int], None]  # the step that begins, steps done, steps in all


@dataclass(frozen=True)
class ExportReport:
    """What an export wrote, how true it is to the model in torch, and how long it took."""

    card: RankerCard
    parity: ParityReport
    files: Mapping[str, FileEntry]
    took_s: float

    @property
    def size_bytes(self) -> int:
        """The size of the bundle."""
        return sum(entry.bytes for entry in self.files.values())


def build_version_zero(
    directory: Path,
    *,
    version: ModelVersion,
    feature_names: Sequence[str],
    prior: Mapping[str, float],
    base_model: str = PACKAGED,
    split_layer: int = 3,
    item_states: int = 4,
    max_user_tokens: int = 96,
    max_item_tokens: int = 32,
    precisions: Sequence[Precision] = DEFAULT_PRECISIONS,
    progress: Progress | None = None,
) -> ExportReport:
    """Writes the untrained ranker, which scores by its prior over cosine and counters, into an empty directory."""
    bert, tokenizer = load_base(base_model)
    torch.manual_seed(0)  # the head's inner layer is drawn at random: the same version 0 everywhere
    ranker = SplitRanker(
        bert, split_layer=split_layer, item_states=item_states, feature_names=feature_names, prior=prior
    )
    return export_bundle(
        ranker,
        tokenizer,
        directory,
        version=version,
        base_model=base_model,
        max_user_tokens=max_user_tokens,
        max_item_tokens=max_item_tokens,
        precisions=precisions,
        progress=progress,
    )


def export_bundle(
    ranker: SplitRanker,
    tokenizer: Tokenizer,
    directory: Path,
    *,
    version: ModelVersion,
    base_model: str = PACKAGED,
    max_user_tokens: int = 96,
    max_item_tokens: int = 32,
    precisions: Sequence[Precision] = DEFAULT_PRECISIONS,
    progress: Progress | None = None,
) -> ExportReport:
    """Writes everything a bundle holds but its manifest, which the registry adds last, into an empty directory.

    Raises ParityError where a graph strays from the torch model by more than its tolerance, BundleError where the
    directory already holds something.
    """
    started = time.perf_counter()
    directory.mkdir(parents=True, exist_ok=True)
    if any(directory.iterdir()):
        raise BundleError(f"{directory} is not empty; a bundle is never written over")
    total = len(precisions) + 3
    announce = progress or (lambda step, done, total: None)

    # 1. Trace the three graphs once, in float32 and in memory.
    announce("trace", 0, total)
    ranker = ranker.eval()
    graphs = trace_graphs(ranker)
    words_VH = ranker.bert.words.weight.detach().numpy()

    # 2. Write each precision from them.
    for done, precision in enumerate(precisions, start=1):
        announce(precision, done, total)
        save_graphs(graphs, words_VH, directory / precision, precision)

    # 3. Write what a warm start and the tokenizing half of serving need.
    announce("weights", total - 2, total)
    tokenizer.no_padding()
    tokenizer.no_truncation()
    tokenizer.save(str(directory / TOKENIZER_FILE), pretty=False)
    weights = {name: weight.detach().contiguous() for name, weight in ranker.state_dict().items()}
    save_file(weights, directory / WEIGHTS_FILE)
    ranker.taste_model.save(directory / TASTE_MODEL_FILE)
    card = describe(
        ranker,
        version=version,
        base_model=base_model,
        max_user_tokens=max_user_tokens,
        max_item_tokens=max_item_tokens,
        precisions=precisions,
    )
    save_ranker_card(card, directory)

    # 4. Prove that what was written says what torch says.
    announce("parity", total - 1, total)
    parity = measure_parity(ranker, tokenizer, graphs, directory, card)
    (directory / PARITY_FILE).write_bytes(msgspec.json.format(msgspec.json.encode(parity), indent=2))
    require_parity(parity)
    announce("done", total, total)
    return ExportReport(card, parity, sum_files(directory), time.perf_counter() - started)


def describe(
    ranker: SplitRanker,
    *,
    version: ModelVersion,
    base_model: str,
    max_user_tokens: int,
    max_item_tokens: int,
    precisions: Sequence[Precision],
) -> RankerCard:
    """Returns the card of a ranker. The prior on it is the linear part of the head as it stands now."""
    shape = ranker.bert.shape
    prior = dict(zip(ranker.feature_names, ranker.head.prior.tolist(), strict=True))
    return RankerCard(
        version=version,
        base_model=base_model,
        split_layer=ranker.split_layer,
        item_states=ranker.item_states,
        text_version=TEXT_VERSION,
        max_user_tokens=max_user_tokens,
        max_item_tokens=max_item_tokens,
        num_layers=shape.num_hidden_layers,
        num_heads=shape.num_attention_heads,
        hidden_size=shape.hidden_size,
        head_width=ranker.head.inner.out_features,
        pad_token_id=shape.pad_token_id or 0,
        feature_names=list(ranker.feature_names),
        feature_names_hash=hash_features(ranker.feature_names),
        prior={name: weight for name, weight in prior.items() if weight},
        precisions=list(precisions),
        bert_config=msgspec.to_builtins(shape),
    )


def load_ranker(directory: Path) -> tuple[SplitRanker, Tokenizer, RankerCard]:
    """Returns the torch ranker of a bundle, for a warm start, with its tokenizer and card. Raises BundleError."""
    card = load_ranker_card(directory)
    ranker = SplitRanker(
        Bert(msgspec.convert(card.bert_config, BertShape)),
        split_layer=card.split_layer,
        item_states=card.item_states,
        feature_names=card.feature_names,
        prior=card.prior,
        head_width=card.head_width,
    )
    ranker.taste_model = TasteModel.load(directory / TASTE_MODEL_FILE)
    try:
        weights = load_file(directory / WEIGHTS_FILE)
        ranker.load_state_dict(weights)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise BundleError(f"{directory / WEIGHTS_FILE}: {error}") from error
    return ranker, Tokenizer.from_file(str(directory / TOKENIZER_FILE)), card
