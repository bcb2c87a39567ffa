"""The one-way split BERT against transformers' BERT, against itself packed otherwise, and against its own export."""

from dataclasses import fields
from functools import cache
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import BertModel

from services.scorer import Scorer
from tailrace.errors import BundleError, ParityError
from tailrace.ids import ModelVersion
from tailrace.tastes import TasteModel
from tests.unit.conftest import FEATURE_NAMES, PRIOR
from training.bert import PACKAGED, Bert, BertShape, _packaged_folder, load_base
from training.export import export_bundle, load_ranker
from training.model import SplitRanker
from training.parity import PARITY_FILE, ParityReport, require_parity

FLOAT_NOISE = 1e-5
VOCAB = 30_522
SMALL = BertShape(
    vocab_size=VOCAB,
    hidden_size=32,
    num_hidden_layers=4,
    num_attention_heads=4,
    intermediate_size=64,
    max_position_embeddings=64,
)


@cache
def small_ranker(*, split_layer: int, item_states: int, seed: int = 0) -> SplitRanker:
    """A small ranker with random weights everywhere, so that every part of it moves the score."""
    torch.manual_seed(seed)
    ranker = SplitRanker(
        Bert(SMALL), split_layer=split_layer, item_states=item_states, feature_names=FEATURE_NAMES, prior=PRIOR
    )
    with torch.no_grad():
        for parameter in ranker.head.parameters():
            parameter.normal_(std=0.3)
    return ranker.eval()


def random_tokens(*shape: int, shortest: int = 1, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Tokens of random texts and their mask; lengths vary from `shortest` to the full width."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1000, 20_000, shape, generator=generator)
    lengths = torch.randint(shortest, shape[-1] + 1, shape[:-1], generator=generator)
    mask = (torch.arange(shape[-1]) < lengths.unsqueeze(-1)).long()
    return tokens * mask, mask


def random_features(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, len(FEATURE_NAMES), generator=torch.Generator().manual_seed(seed))


def random_worth(*shape: int, seed: int = 0) -> Tensor:
    """What the candidates' tags are worth to their users, [B,N]."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def reference() -> BertModel:
    return BertModel.from_pretrained(
        _packaged_folder(), attn_implementation="eager", add_pooling_layer=False, local_files_only=True
    ).eval()


@pytest.fixture(scope="module")
def packaged() -> Bert:
    return load_base(PACKAGED)[0].eval()


@torch.no_grad()
def run_packed(bert: BertModel, user: tuple[Tensor, Tensor], items: tuple[Tensor, Tensor], split_layer: int) -> Tensor:
    """Mean top state of each item when user and items lie in one sequence under an explicit one-way mask."""
    (user_tokens, user_mask), (item_tokens, item_mask) = user, items
    batch, count, width = item_tokens.shape
    tokens = torch.cat([user_tokens, item_tokens.reshape(batch, -1)], 1)
    real = torch.cat([user_mask, item_mask.reshape(batch, -1)], 1).bool()
    positions = torch.cat([torch.arange(user_tokens.shape[1]), torch.arange(width).repeat(count)])
    owner = torch.cat([torch.zeros(user_tokens.shape[1]), torch.arange(1, count + 1).repeat_interleave(width)])
    own = owner[:, None] == owner[None, :]
    own_or_user = own | (owner[None, :] == 0)
    states = bert.embeddings(tokens, position_ids=positions[None])
    for depth, layer in enumerate(bert.encoder.layer):
        seen = (own_or_user if depth >= split_layer else own)[None] & real[:, None, :]
        states = layer(states, torch.where(seen, 0.0, torch.finfo(torch.float32).min)[:, None])
    top = states[:, user_tokens.shape[1] :].reshape(batch, count, width, -1)
    return (top * item_mask.unsqueeze(-1)).sum(2) / item_mask.sum(2, keepdim=True)


@pytest.mark.parametrize("split_layer", [0, 3, 6])
def test_all_tokens_equal_transformers_under_the_one_way_mask(
    reference: BertModel, packaged: Bert, split_layer: int
) -> None:
    ranker = SplitRanker(packaged, split_layer=split_layer, item_states=0, feature_names=FEATURE_NAMES, prior=PRIOR)
    user, items = random_tokens(2, 20, shortest=5), random_tokens(2, 4, 9, shortest=3)
    with torch.no_grad():
        keys, values, vectors = ranker.encode_users(*user)
        states, mask, _ = ranker.encode_items(*(part.reshape(8, 9) for part in items))
        shaped = states.reshape(2, 4, 9, -1), mask.reshape(2, 4, 9)
        pooled = ranker.score(keys, values, user[1], vectors, *shaped, random_features(2, 4), random_worth(2, 4))[2]
    torch.testing.assert_close(pooled, run_packed(reference, user, items, split_layer), atol=FLOAT_NOISE, rtol=0)


def test_vectors_equal_mean_pooling_of_transformers(reference: BertModel, packaged: Bert) -> None:
    ranker = SplitRanker(packaged, feature_names=FEATURE_NAMES, prior=PRIOR)
    tokens, mask = random_tokens(6, 15, shortest=2)
    with torch.no_grad():
        top = reference(input_ids=tokens, attention_mask=mask).last_hidden_state
        mean = (top * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True)
        expected = torch.nn.functional.normalize(mean, dim=-1)
        of_items, of_users = ranker.encode_items(tokens, mask)[2], ranker.encode_users(tokens, mask)[2]
    torch.testing.assert_close(of_items, expected, atol=FLOAT_NOISE, rtol=0)
    torch.testing.assert_close(of_users, expected, atol=FLOAT_NOISE, rtol=0)


def test_untrained_logits_are_exactly_the_prior_and_what_tags_are_worth() -> None:
    ranker = SplitRanker(Bert(SMALL), feature_names=FEATURE_NAMES, prior=PRIOR).eval()
    features = random_features(2, 5) * 3
    with torch.no_grad():
        worth = random_worth(2, 5)
        logits, ratings = ranker(*random_tokens(2, 10), *random_tokens(2, 5, 6), features, worth)
    weights = torch.tensor([PRIOR.get(name, 0.0) for name in FEATURE_NAMES])
    torch.testing.assert_close(logits, features @ weights + worth, atol=1e-6, rtol=1e-6)
    assert ((ratings > 1) & (ratings < 5)).all()
    assert torch.equal(logits.argsort(), ratings.argsort())


def test_untrained_rating_of_a_zero_prior_is_three() -> None:
    ranker = SplitRanker(Bert(SMALL), feature_names=FEATURE_NAMES, prior={}).eval()
    with torch.no_grad():
        ratings = ranker(*random_tokens(1, 10), *random_tokens(1, 5, 6), random_features(1, 5), torch.zeros(1, 5))[1]
    assert torch.equal(ratings, torch.full((1, 5), 3.0))


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    count=st.integers(1, 6),
    mates=st.integers(0, 6),
    split_layer=st.integers(0, 4),
    item_states=st.sampled_from([0, 1, 3, 4]),
    order=st.randoms(use_true_random=False),
)
def test_score_never_depends_on_batch_mates(seed, count, mates, split_layer, item_states, order) -> None:  # type: ignore[no-untyped-def]
    ranker = small_ranker(split_layer=split_layer, item_states=item_states)
    user = random_tokens(1, 9, shortest=2, seed=seed)
    tokens, mask = random_tokens(1, count + mates, 7, seed=seed + 1)
    features = random_features(1, count + mates, seed=seed)
    worth = random_worth(1, count + mates, seed=seed)
    places = list(range(count + mates))
    order.shuffle(places)

    def score_among(chosen: list[int]) -> tuple[Tensor, Tensor]:
        of_items = (part[:, chosen] for part in (tokens, mask, features, worth))
        scores: tuple[Tensor, Tensor] = ranker(*user, *of_items)
        return scores

    with torch.no_grad():
        alone = [score_among([item]) for item in range(count)]
        logits, ratings = score_among(places)
    for item, (logit, rating) in enumerate(alone):
        place = places.index(item)
        torch.testing.assert_close(logits[:, [place]], logit, atol=FLOAT_NOISE, rtol=0)
        torch.testing.assert_close(ratings[:, [place]], rating, atol=FLOAT_NOISE, rtol=0)


def test_user_encoded_once_equals_encoded_for_each_item() -> None:
    ranker = small_ranker(split_layer=1, item_states=2)
    tokens, mask = random_tokens(1, 9, shortest=4)
    item_tokens, item_mask = random_tokens(1, 5, 7)
    features, worth = random_features(1, 5), random_worth(1, 5)
    with torch.no_grad():
        shared = ranker(tokens, mask, item_tokens, item_mask, features, worth)[0]
        one_each = ranker(
            tokens.expand(5, -1),
            mask.expand(5, -1),
            item_tokens[0, :, None],
            item_mask[0, :, None],
            features[0, :, None],
            worth[0, :, None],
        )[0]
    torch.testing.assert_close(shared[0], one_each[:, 0], atol=FLOAT_NOISE, rtol=0)


@pytest.mark.parametrize("item_states", [0, 3])
def test_more_padding_changes_nothing(item_states: int) -> None:
    ranker = small_ranker(split_layer=2, item_states=item_states)
    user, items, features = random_tokens(2, 9), random_tokens(2, 3, 7), random_features(2, 3)
    wider = [torch.nn.functional.pad(part, (0, 4)) for part in (*user, *items)]
    with torch.no_grad():
        tight, padded = (ranker(*texts, features, random_worth(2, 3))[0] for texts in ((*user, *items), wider))
    torch.testing.assert_close(tight, padded, atol=FLOAT_NOISE, rtol=0)


@settings(max_examples=50, deadline=None)
@given(real=st.integers(1, 20), padding=st.integers(0, 5), item_states=st.integers(1, 8))
def test_pooled_states_are_means_of_contiguous_segments_of_real_tokens(
    real: int, padding: int, item_states: int
) -> None:
    ranker = small_ranker(split_layer=0, item_states=item_states)
    states = torch.randn(1, real + padding, 32, generator=torch.Generator().manual_seed(real))
    mask = torch.tensor([[1] * real + [0] * padding])
    pooled, pooled_mask = ranker._pool_segments(states, mask)
    for segment in range(item_states):
        members = [token for token in range(real) if token * item_states // real == segment]
        assert pooled_mask[0, segment] == bool(members)
        if members:
            torch.testing.assert_close(pooled[0, segment], states[0, members].mean(0), atol=FLOAT_NOISE, rtol=0)


def test_every_part_learns_once_the_zero_layers_have_moved() -> None:
    ranker = small_ranker(split_layer=2, item_states=4).train()
    logits, ratings = ranker(*random_tokens(2, 9), *random_tokens(2, 3, 7), random_features(2, 3), random_worth(2, 3))
    (logits.logsumexp(-1).sum() + ratings.sum()).backward()
    untouched = [name for name, weight in ranker.named_parameters() if weight.grad is None]
    assert untouched == []


def test_prior_over_an_unknown_feature_is_refused() -> None:
    with pytest.raises(ValueError, match="no_such_feature"):
        SplitRanker(Bert(SMALL), feature_names=FEATURE_NAMES, prior={"no_such_feature": 1.0})


def test_split_above_the_last_layer_is_refused() -> None:
    with pytest.raises(ValueError, match=r"not within 0\.\.4"):
        SplitRanker(Bert(SMALL), split_layer=5, feature_names=FEATURE_NAMES, prior=PRIOR)


@pytest.mark.parametrize(("split_layer", "item_states"), [(0, 0), (2, 0), (2, 3), (4, 1)])
def test_exported_graphs_score_as_torch_does_at_every_setting_of_the_dial(
    tmp_path: Path, split_layer: int, item_states: int
) -> None:
    ranker = small_ranker(split_layer=split_layer, item_states=item_states)
    tokenizer = load_base(PACKAGED)[1]
    report = export_bundle(ranker, tokenizer, tmp_path / "b", version=ModelVersion("t"), precisions=("fp32",))
    assert report.parity.precisions["fp32"].differences["click_logits"].max < 1e-3

    scorer = Scorer.load(tmp_path / "b", precision="fp32")
    users, items = ["likes the sea", "reads about chess, and long winters"], ["a novel", "the sea, the sea", "x", "y z"]
    encoded = scorer.encode_items(items)
    features = random_features(2, 4)
    states, mask = (np.stack([part, part]) for part in (encoded.states_NTH, encoded.mask_NT))
    worth = random_worth(2, 4)
    logits, ratings = scorer.score(scorer.encode_users(users), states, mask, features.numpy(), worth.numpy())

    def tokens(texts: list[str]) -> tuple[Tensor, Tensor]:
        tokenizer.enable_padding()
        found = tokenizer.encode_batch(texts)
        return torch.tensor([text.ids for text in found]), torch.tensor([text.attention_mask for text in found])

    item_tokens = [part.expand(2, -1, -1) for part in tokens(items)]
    with torch.no_grad():
        expected_logits, expected_ratings = ranker(*tokens(users), *item_tokens, features, worth)
    # item states rest in float16 between the two graphs
    np.testing.assert_allclose(logits, expected_logits.numpy(), atol=5e-3)
    np.testing.assert_allclose(ratings, expected_ratings.numpy(), atol=5e-3)


def test_warm_start_scores_as_what_was_saved(tmp_path: Path) -> None:
    ranker = small_ranker(split_layer=2, item_states=3)
    ranker.head.feature_mean.fill_(0.5)
    ranker.taste_model = TasteModel(
        np.array([3, 5], np.int16), *np.ones((1, 2), np.float32), np.eye(2, dtype=np.float32),
        *np.full((2, 2), 0.1, np.float32), np.eye(2, dtype=np.float32), gain=0.3,
    )  # fmt: skip
    export_bundle(ranker, load_base(PACKAGED)[1], tmp_path / "b", version=ModelVersion("t"), precisions=("fp32",))
    again, _, card = load_ranker(tmp_path / "b")
    inputs = *random_tokens(2, 9), *random_tokens(2, 3, 7), random_features(2, 3), random_worth(2, 3)
    with torch.no_grad():
        assert torch.equal(again.eval()(*inputs)[0], ranker(*inputs)[0])
    assert (card.split_layer, card.item_states, tuple(card.feature_names)) == (2, 3, FEATURE_NAMES)
    for loaded in (again.taste_model, Scorer.load(tmp_path / "b", precision="fp32").taste_model):
        for field in fields(TasteModel):
            np.testing.assert_array_equal(getattr(loaded, field.name), getattr(ranker.taste_model, field.name))


def test_export_never_writes_over_a_folder(tmp_path: Path) -> None:
    (tmp_path / "something").touch()
    with pytest.raises(BundleError, match="not empty"):
        export_bundle(
            small_ranker(split_layer=0, item_states=1), load_base(PACKAGED)[1], tmp_path, version=ModelVersion("t")
        )


def test_version_zero_is_within_tolerance_in_every_precision(bundle_dir: Path) -> None:
    report = msgspec.json.decode((bundle_dir / PARITY_FILE).read_bytes(), type=ParityReport)
    assert set(report.precisions) == {"onnx", "int8", "fp16", "fp32"}
    require_parity(report)
    for parity in report.precisions.values():  # the head is float32 everywhere: version 0 scores alike
        assert parity.differences["click_logits"].max < 1e-5


def test_parity_outside_tolerance_is_refused_naming_the_figure(bundle_dir: Path) -> None:
    report = msgspec.json.decode((bundle_dir / PARITY_FILE).read_bytes())
    report["precisions"]["int8"]["differences"]["click_logits"]["mean"] = 3.0
    report["precisions"]["fp16"]["ranks"]["retrieval"]["spearman"] = 0.5
    with pytest.raises(ParityError, match=r"int8: click logits mean .*fp16: retrieval order 0\.5"):
        require_parity(msgspec.convert(report, ParityReport))
