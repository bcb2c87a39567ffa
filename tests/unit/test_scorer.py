"""Serving's half of the ranker: sessions, tokens and batches, on version 0 exported from the packaged MiniLM."""

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from services.scorer import EncodedItems, EncodedUsers, Scorer
from tailrace.errors import BundleError, ProviderError
from tailrace.tastes import BUCKETS, TasteModel
from tests.unit.conftest import FEATURE_NAMES, PRIOR

USERS = [
    "loved: Moby-Dick, The Sea Wolf; interests: the sea, ships",
    "disliked: a cookery book; query: murder in Paris",
]
ITEMS = [
    "The Old Man and the Sea. tags: novel, fishing. An old fisherman and a great marlin.",
    "The Joy of Cooking. tags: cookery",
    "The Murders in the Rue Morgue. tags: crime. by Edgar Allan Poe. A detective in Paris reads the clues.",
    "Chess",
    "A History of the World in many more words than a title needs. tags: history",
]


@pytest.fixture(scope="module")
def exact(bundle_dir: Path) -> Scorer:
    return Scorer.load(bundle_dir, precision="fp32")


@pytest.fixture(scope="module")
def quantized(bundle_dir: Path) -> Scorer:
    return Scorer.load(bundle_dir, precision="int8")


def random_features(batch: int, count: int) -> np.ndarray:
    return np.random.default_rng(3).standard_normal((batch, count, len(FEATURE_NAMES))).astype(np.float32)


def random_worth(batch: int, count: int) -> np.ndarray:
    return np.random.default_rng(4).normal(size=(batch, count)).astype(np.float32)


def slates(items: EncodedItems, rows: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    return items.states_NTH[np.array(rows)], items.mask_NT[np.array(rows)]


def user_at(users: EncodedUsers, row: int) -> EncodedUsers:
    one = slice(row, row + 1)
    return EncodedUsers(users.keys[one], users.values[one], users.mask[one], users.vectors_BD[one])


@pytest.mark.skipif(
    "CUDAExecutionProvider" in onnxruntime.get_available_providers(), reason="this build of ONNX Runtime knows CUDA"
)
def test_provider_that_is_not_there_is_refused(bundle_dir: Path) -> None:
    with pytest.raises(ProviderError, match="CUDAExecutionProvider"):
        Scorer.load(bundle_dir, precision="fp16", provider="cuda")


@pytest.mark.parametrize(
    "name", ["int8/scorer.onnx", "int8/user_encoder.onnx", "tokenizer.json", "tastes.safetensors", "model.json"]
)
def test_damaged_file_is_named(bundle_dir: Path, tmp_path: Path, name: str) -> None:
    copy = shutil.copytree(bundle_dir, tmp_path / "b", ignore=shutil.ignore_patterns("fp*", "weights*"))
    (copy / name).write_bytes((copy / name).read_bytes()[:200])
    with pytest.raises(BundleError, match=name):
        Scorer.load(copy)


@pytest.mark.parametrize("name", ["int8/item_encoder.onnx", "int8/words.bin", "tastes.safetensors", "model.json"])
def test_missing_file_is_named(bundle_dir: Path, tmp_path: Path, name: str) -> None:
    copy = shutil.copytree(bundle_dir, tmp_path / "b", ignore=shutil.ignore_patterns("fp*", "weights*"))
    (copy / name).unlink()
    with pytest.raises(BundleError, match=Path(name).name):
        Scorer.load(copy)


def test_taste_model_that_fits_no_bucket_or_not_itself_is_refused(bundle_dir: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(bundle_dir, tmp_path / "b", ignore=shutil.ignore_patterns("fp*", "weights*"))
    one_T, one_TT = np.ones(1, np.float32), np.ones((1, 1), np.float32)
    sound = TasteModel(np.array([1], np.int16), one_T, one_TT, one_T, one_T, one_TT, gain=1.0)
    sound.save(copy / "tastes.safetensors")
    assert Scorer.load(copy).taste_model.gain == 1.0
    for wrong in (
        replace(sound, known_T=np.array([-1], np.int16)),
        replace(sound, known_T=np.array([BUCKETS], np.int16)),
        replace(sound, known_T=np.array([1.0])),
        replace(sound, covariance_TT=np.ones((2, 2), np.float32)),
        replace(sound, covariance_TT=-one_TT),
        replace(sound, information_T=-one_T),
        replace(sound, mean_T=one_T * np.nan),
        replace(sound, gain=float("inf")),
    ):
        wrong.save(copy / "tastes.safetensors")
        with pytest.raises(BundleError, match=r"tastes\.safetensors"):
            Scorer.load(copy)


def test_precision_that_was_not_exported_is_refused(bundle_dir: Path) -> None:
    with pytest.raises(BundleError, match="holds int8, fp16, fp32, not int4"):
        Scorer.load(bundle_dir, precision="int4")  # type: ignore[arg-type]  # what a setting of tomorrow may ask for


@pytest.mark.parametrize("precision", ["int8", "fp16", "fp32"])
def test_version_zero_scores_by_its_prior_and_worths_of_tags(bundle_dir: Path, precision: str) -> None:
    scorer = Scorer.load(bundle_dir, precision=precision)  # type: ignore[arg-type]  # parametrize gives a plain str
    features = random_features(2, 5)
    features[0, 0] = 1e6  # a raw counter may be larger than float16 can hold
    states, mask = slates(scorer.encode_items(ITEMS), [[0, 1, 2, 3, 4]] * 2)
    worth = random_worth(*mask.shape[:2])
    logits, ratings = scorer.score(scorer.encode_users(USERS), states, mask, features, worth)
    weights = np.array([PRIOR.get(name, 0.0) for name in FEATURE_NAMES], np.float32)
    np.testing.assert_allclose(logits, features @ weights + worth, rtol=1e-5, atol=1e-5)
    assert ((ratings >= 1) & (ratings <= 5)).all()


def test_items_keep_their_order_and_vectors_whatever_is_encoded_with_them(exact: Scorer) -> None:
    many = ITEMS * 9  # more than one micro-batch
    together, alone = exact.encode_items(many), [exact.encode_items([text]) for text in ITEMS]
    for row in range(len(many)):
        expected = alone[row % len(ITEMS)]
        np.testing.assert_allclose(together.vectors_ND[row], expected.vectors_ND[0], atol=1e-5)
        np.testing.assert_allclose(together.states_NTH[row], expected.states_NTH[0], atol=5e-3)  # float16
        np.testing.assert_array_equal(together.mask_NT[row], expected.mask_NT[0])


def test_quantized_vectors_stay_close_to_exact_ones(exact: Scorer, quantized: Scorer) -> None:
    cosines = (exact.encode_items(ITEMS).vectors_ND * quantized.encode_items(ITEMS).vectors_ND).sum(-1)
    assert cosines.min() > 0.98
    similar = quantized.encode_users(USERS).vectors_BD @ quantized.encode_items(ITEMS).vectors_ND.T
    assert similar.argmax(1).tolist() == [0, 2]


@pytest.mark.parametrize("name", ["user_encoder", "item_encoder", "scorer"])
def test_every_product_of_a_quantized_graph_is_int8_but_the_heads(bundle_dir: Path, name: str) -> None:
    graph = onnx.load(bundle_dir / "int8" / f"{name}.onnx", load_external_data=False).graph
    constants = {one.name for one in graph.initializer}
    products = [node for node in graph.node if node.op_type in ("MatMul", "FusedMatMul", "Gemm")]
    in_floats = [node.name for node in products if set(node.input) & constants]
    assert all("/head/" in found for found in in_floats), in_floats


def test_embedded_query_meets_the_item_about_it(quantized: Scorer) -> None:
    vectors = quantized.encode_users(["fishing at sea", "what to cook", "the game of chess"]).vectors_BD
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    assert (vectors @ quantized.encode_items(ITEMS).vectors_ND.T).argmax(1).tolist() == [0, 1, 3]


def test_requests_scored_together_equal_requests_scored_alone(exact: Scorer) -> None:
    users, items = exact.encode_users(USERS), exact.encode_items(ITEMS)
    states, mask = slates(items, [[0, 1, 2], [4, 3, 0]])
    together = exact.pool(users, states, mask)
    for row in range(2):
        alone = exact.pool(user_at(users, row), states[row : row + 1], mask[row : row + 1])
        np.testing.assert_allclose(together[row], alone[0], atol=1e-4)


def test_long_slates_are_scored_in_parts_without_a_trace(exact: Scorer) -> None:
    rows = [[i % len(ITEMS) for i in range(700)]]
    states, mask = slates(exact.encode_items(ITEMS), rows)
    features = random_features(1, 700)
    users = exact.encode_users(USERS[:1])
    worth = random_worth(1, 700)
    logits, _ = exact.score(users, states, mask, features, worth)
    last, _ = exact.score(users, states[:, -3:], mask[:, -3:], features[:, -3:], worth[:, -3:])
    np.testing.assert_allclose(logits[:, -3:], last, atol=1e-5)
    pooled = exact.pool(users, states, mask)
    np.testing.assert_allclose(pooled[:, -3:], exact.pool(users, states[:, -3:], mask[:, -3:]), atol=1e-5)


def test_texts_are_cut_at_the_limits_of_the_card(exact: Scorer) -> None:
    assert exact.encode_users(["sea " * 500]).mask.shape == (1, exact.card.max_user_tokens)
    endless, cut = exact.encode_items(["sea " * 500]), exact.encode_items(["sea " * (exact.card.max_item_tokens - 2)])
    np.testing.assert_allclose(endless.vectors_ND, cut.vectors_ND, atol=1e-6)


def test_empty_lists_give_empty_answers(exact: Scorer) -> None:
    items = exact.encode_items([])
    assert items.states_NTH.shape == (0, 4, 384)
    logits, ratings = exact.score(
        exact.encode_users(USERS),
        np.zeros((2, 0, 4, 384), np.float16),
        np.zeros((2, 0, 4), np.bool_),
        random_features(2, 0),
        random_worth(2, 0),
    )
    assert logits.shape == ratings.shape == (2, 0)
    nobody = np.zeros((2, 0, 4, 384), np.float16), np.zeros((2, 0, 4), np.bool_)
    assert exact.pool(exact.encode_users(USERS), *nobody).shape == (2, 0, 384)


def test_features_of_another_model_are_refused(exact: Scorer) -> None:
    states, mask = slates(exact.encode_items(ITEMS), [[0, 1]])
    users, worth = exact.encode_users(USERS[:1]), random_worth(1, 2)
    with pytest.raises(ValueError, match="features have shape"):
        exact.score(users, states, mask, np.zeros((1, 2, 3), np.float32), worth)
    with pytest.raises(ValueError, match="worths of tags"):
        exact.score(users, states, mask, random_features(1, 2), worth[:, 1:])


def test_serving_imports_neither_torch_nor_transformers() -> None:
    program = "import sys, services.scorer; sys.exit(bool({'torch', 'transformers', 'onnx'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", program], env=os.environ, check=False).returncode == 0
