"""What holds on a GPU as on a CPU: scores, whoever else is in the batch, and learning. Skipped without a card."""

import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

from services.encodings import EncodedItems
from services.loaded_model import LoadedModel
from services.scorer import Scorer
from tailrace.features import FEATURE_NAMES, PRIOR_WEIGHTS
from tailrace.ids import ModelVersion
from tailrace.settings import TrainingSettings, load_settings
from tests.bench.training import make_example
from training.bert import PACKAGED, load_base
from training.export import export_bundle, load_ranker
from training.fine_tune import FineTuned, fine_tune
from training.model import SplitRanker
from training.parity import TOLERANCES, made_up_texts

pytestmark = pytest.mark.skipif(
    "CUDAExecutionProvider" not in onnxruntime.get_available_providers() or not torch.cuda.is_available(),
    reason="needs a GPU and onnxruntime-gpu",
)
USERS, ITEMS = made_up_texts()
FP16 = TOLERANCES["fp16"]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ranker whose head listens to texts, as it serves, and in fp32 to compare with."""
    bert, tokenizer = load_base(PACKAGED)
    torch.manual_seed(0)
    ranker = SplitRanker(bert, feature_names=FEATURE_NAMES, prior=PRIOR_WEIGHTS)
    for weight in (ranker.head.outer.weight, ranker.head.match_gain):
        torch.nn.init.normal_(weight, std=0.3)
    directory = tmp_path_factory.mktemp("cuda") / "v0"
    export_bundle(ranker, tokenizer, directory, version=ModelVersion("v0"), precisions=("fp16", "fp32"))
    return directory


def random_numbers(count: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(5)
    features = rng.normal(size=(1, count, len(FEATURE_NAMES))).astype(np.float32)
    return features, rng.normal(size=(1, count)).astype(np.float32)


def test_fp16_on_the_gpu_scores_as_fp32_on_the_cpu_does(bundle: Path) -> None:
    exact = Scorer.load(bundle, precision="fp32")
    on_gpu = Scorer.load(bundle, precision="fp16", provider="cuda")
    numbers = random_numbers(len(ITEMS))
    by_user = []
    for user in USERS:
        found = []
        for scorer in (exact, on_gpu):
            users, items = scorer.encode_users([user]), scorer.encode_items(ITEMS)
            found.append((*scorer.score(users, items.states_NTH[None], items.mask_NT[None], *numbers), items, users))
        (clicks, ratings, items, users), (own_clicks, own_ratings, own_items, own_users) = found
        scale = max(float(clicks.std()), 1.0)
        assert np.abs(own_items.vectors_ND - items.vectors_ND).max() < FP16.vectors_max
        assert np.abs(own_users.vectors_BD - users.vectors_BD).max() < FP16.vectors_max
        assert np.abs(own_clicks - clicks).max() / scale < FP16.logits_max
        assert np.abs(own_ratings - ratings).max() < FP16.ratings_max
        by_user.append(own_clicks)
    assert np.ptp(by_user, axis=0).max() > 2 * FP16.logits_max  # who asks matters, so what was compared is the model


def test_process_without_torch_serves_on_the_gpu(bundle: Path) -> None:
    program = f"""
import sys
from pathlib import Path
from services.scorer import Scorer

scorer = Scorer.load(Path({str(bundle)!r}), precision="fp16", provider="cuda")
assert scorer.encode_users(["loved: ghosts"]).vectors_BD.shape == (1, 384)
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


def test_model_on_the_gpu_answers_callers_at_once_as_it_answers_each_alone(bundle: Path, tmp_path: Path) -> None:
    settings = load_settings(None, environ={}, data_dir=str(tmp_path), ranker={"device": "cuda"})
    models = [LoadedModel.load(bundle, ModelVersion("v0"), settings) for _ in range(2)]  # each with caches of its own
    for model in models:
        model.start()
    items = EncodedItems(ITEMS, *models[0].encode_items(ITEMS))

    def ask(model: LoadedModel, number: int) -> np.ndarray:
        deadline = time.monotonic() + 60
        count = 1 + number % len(ITEMS)  # slates of several sizes are padded in a batch
        user = model.encode_user(f"{USERS[number % len(USERS)]}; {'more and ' * (number % 7)} {number}", deadline)
        chosen = EncodedItems(ITEMS[:count], items.states_NTH[:count], items.mask_NT[:count], items.vectors_ND[:count])
        rng = np.random.default_rng(number)
        features = rng.normal(size=(count, len(FEATURE_NAMES))).astype(np.float32)
        return model.score(user, chosen, features, rng.normal(size=count).astype(np.float32), deadline)[0]

    alone = [ask(models[0], number) for number in range(64)]
    with ThreadPoolExecutor(16) as pool:
        together = list(pool.map(partial(ask, models[1]), range(64)))
    for model in models:
        model.retire()
    assert np.ptp([scores[0] for scores in alone]) > 2 * FP16.logits_max
    for own, other in zip(alone, together, strict=True):
        assert np.abs(own - other).max() < FP16.logits_max * max(float(own.std()), 1.0)


@pytest.mark.parametrize("layers", [0, 2])
def test_learning_on_the_gpu_comes_to_what_it_comes_to_on_the_cpu(bundle: Path, tmp_path: Path, layers: int) -> None:
    ranker, tokenizer, card = load_ranker(bundle)
    examples = [make_example(number) for number in range(160)]

    def learn(device: str, precision: str) -> FineTuned:
        return fine_tune(
            ranker,
            tokenizer,
            examples[:128],
            examples[128:],
            examples[:16],
            TrainingSettings(
                device=device, precision=precision, trainable_layers=layers, dropout=0.0, trackers=[], epochs=2
            ),
            max_user_tokens=card.max_user_tokens,
            max_item_tokens=card.max_item_tokens,
            folder=tmp_path / f"{device}-{precision}",
        )

    cpu, cuda, half = learn("cpu", "fp32"), learn("cuda", "fp32"), learn("cuda", "bf16")
    for theirs, tolerance in ((cuda, 1e-3), (half, 5e-2)):
        for own, other in zip(cpu.history, theirs.history, strict=True):
            assert own.stop_loss is not None and other.stop_loss is not None
            assert abs(other.stop_loss / own.stop_loss - 1) < tolerance
    # What learned on the GPU is back on the CPU, and exports within the tolerances of parity.
    assert all(weight.device.type == "cpu" for weight in half.ranker.state_dict().values())
    export_bundle(half.ranker, tokenizer, tmp_path / "learned", version=ModelVersion("v1"))
