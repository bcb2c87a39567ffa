"""What a head that learns alone is given: the very states that the bundle of its parent serves."""

from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch

from services.scorer import Scorer
from tailrace.ids import ModelVersion
from tailrace.settings import TrainingSettings
from tests.unit.conftest import FEATURE_NAMES
from tests.unit.test_fine_tune import by_word, change, make_examples
from training.dataset import Corpus
from training.examples import Example
from training.export import export_bundle, load_ranker
from training.fine_tune import FineTuned, fine_tune
from training.learner import Learner
from training.lessons import Lesson
from training.rescoring import score_examples

EXAMPLES = make_examples(40, by_word) + make_examples(8, by_word, num_shown=3, num_unshown=0, seed=4)


@pytest.fixture(scope="module")
def learned(bundle_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle whose head makes something of every state."""
    ranker, tokenizer, _ = load_ranker(bundle_dir)
    with torch.no_grad():
        ranker.head.outer.weight.normal_(std=0.5, generator=torch.Generator().manual_seed(5))
        ranker.head.match_gain.fill_(1.0)
    folder = tmp_path_factory.mktemp("learned") / "v1"
    export_bundle(ranker, tokenizer, folder, version=ModelVersion("v1"), precisions=("int8", "fp32"))
    return folder


def click_logits(bundle: Path, served: Scorer | None, kept_bytes: int = 2**30) -> list[np.ndarray]:
    """What training makes of the examples, with the head of a bundle, read by that or by torch."""
    ranker, tokenizer, card = load_ranker(bundle)
    corpus = Corpus(
        ranker.eval(),
        tokenizer,
        [Lesson(example) for example in EXAMPLES],
        first_layer=card.num_layers,
        max_user_tokens=card.max_user_tokens,
        max_item_tokens=card.max_item_tokens,
        units=(np.zeros(len(FEATURE_NAMES)), np.ones(len(FEATURE_NAMES))),
        precision=nullcontext,
        device=torch.device("cpu"),
        threads=2,
        served=served,
        kept_bytes=kept_bytes,
    )
    with torch.no_grad():
        logits_BN = Learner(ranker, card.num_layers, num_positions=1)(
            corpus.batch(range(len(EXAMPLES)), ranker.taste_model)
        )[0]
    return [row[: len(one.texts)].numpy() for row, one in zip(logits_BN, EXAMPLES, strict=True)]


def distance(ours: list[np.ndarray], theirs: list[np.ndarray]) -> float:
    return float(np.abs(np.concatenate(ours) - np.concatenate(theirs)).mean())


@pytest.mark.parametrize("kept_bytes", [2**30, 0])
def test_a_head_learns_from_what_its_parent_serves_quantized_as_it_is(learned: Path, kept_bytes: int) -> None:
    quantized = Scorer.load(learned, precision="int8")
    served = score_examples(quantized, EXAMPLES, rating_weight=0.0)
    by_graphs = distance(click_logits(learned, quantized, kept_bytes), served)
    by_torch = distance(click_logits(learned, None), served)
    assert by_graphs < 0.003  # states rest as float16
    assert by_torch > 5 * by_graphs


def test_graphs_in_float32_read_what_torch_reads(learned: Path) -> None:
    exact = Scorer.load(learned, precision="fp32")
    assert distance(click_logits(learned, exact), click_logits(learned, None)) < 0.003


def tune(bundle: Path, folder: Path, settings: TrainingSettings, served: Scorer) -> FineTuned:
    ranker, tokenizer, card = load_ranker(bundle)
    train: list[Example] = EXAMPLES[:32]
    return fine_tune(
        ranker,
        tokenizer,
        train,
        EXAMPLES[32:],
        (),
        settings,
        max_user_tokens=card.max_user_tokens,
        max_item_tokens=card.max_item_tokens,
        folder=folder,
        served=served,
    )


class Watched(Scorer):
    """A scorer that counts what it is asked to read."""

    read = 0

    def pool(self, *given: object) -> np.ndarray:
        self.read += 1
        return super().pool(*given)


def test_only_a_head_that_learns_alone_reads_what_is_served(bundle_dir: Path, tmp_path: Path) -> None:
    watched = Watched.load(bundle_dir)
    tune(bundle_dir, tmp_path / "layer", change(epochs=1, trainable_layers=1), watched)
    assert watched.read == 0
    tune(bundle_dir, tmp_path / "head", change(epochs=1), watched)
    assert watched.read > len(EXAMPLES) / 2  # of the silent ones few are read


def test_checkpoint_is_left_alone_where_texts_are_read_at_another_precision(bundle_dir: Path, tmp_path: Path) -> None:
    quantized, exact = (Scorer.load(bundle_dir, precision=precision) for precision in ("int8", "fp32"))
    resumed = [tune(bundle_dir, tmp_path, change(epochs=1), one).resumed for one in (quantized, quantized, exact)]
    assert resumed == [False, True, False]
