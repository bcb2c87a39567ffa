"""Each loss against its definition, and against what must not matter to it."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import ndcg_score
from torch import Tensor

from training.losses import listwise_loss, ndcg, parent_loss, pointwise_loss, rating_loss

NAN = float("nan")


def flags(*rows: str) -> Tensor:
    """A mask from rows of 1 and 0."""
    return torch.tensor([[mark == "1" for mark in row] for row in rows])


def test_listwise_loss_of_one_click_is_minus_log_softmax() -> None:
    logits = torch.tensor([[1.0, 2.0, 0.5]])
    loss = listwise_loss(logits, torch.tensor([[0.0, 1.0, 0.0]]), flags("111"), flags("111"), unshown_weight=1.0)
    torch.testing.assert_close(loss, -torch.log_softmax(logits, 1)[0, 1])


def test_listwise_loss_is_least_where_the_softmax_is_the_share_of_gain() -> None:
    gains = torch.tensor([[3.0, 1.0, 0.0]])
    mask = flags("111")
    at_best = listwise_loss(torch.tensor([[math.log(3), 0.0, -40.0]]), gains, mask, mask, unshown_weight=1.0)
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert float(at_best) == pytest.approx(entropy, abs=1e-5)
    assert listwise_loss(torch.zeros(1, 3), gains, mask, mask, unshown_weight=1.0) > at_best


def test_slate_without_a_gain_gives_neither_loss_nor_gradient() -> None:
    logits = torch.randn(2, 3, requires_grad=True)
    gains = torch.tensor([[0.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    listwise_loss(logits, gains, flags("111", "111"), flags("111", "111"), unshown_weight=0.5).backward()
    assert logits.grad is not None
    assert not logits.grad[0].any()
    assert logits.grad[1].all()


def test_batch_of_silent_slates_is_zero_and_finite_all_the_way() -> None:
    logits = torch.randn(2, 3, requires_grad=True)
    nothing = torch.zeros(2, 3)
    mask = flags("110", "100")
    loss = listwise_loss(logits, nothing, mask, mask, unshown_weight=0.0)
    loss = loss + rating_loss(logits, nothing * NAN) + parent_loss(logits, nothing, mask, torch.tensor([False, False]))
    loss.backward()
    assert loss.item() == 0
    assert logits.grad is not None
    assert not logits.grad.any()


def test_weight_of_the_unshown_is_how_many_times_they_stand_in_the_denominator() -> None:
    logits, gains = torch.tensor([[1.0, 0.0, 2.0]]), torch.tensor([[1.0, 0.0, 0.0]])
    found = [float(listwise_loss(logits, gains, flags("110"), flags("111"), unshown_weight=w)) for w in (0.0, 0.5, 1.0)]
    expected = [math.log(math.e + 1 + weight * math.e**2) - 1 for weight in (0.0, 0.5, 1.0)]
    assert found == pytest.approx(expected, abs=1e-5)


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10_000), padding=st.integers(0, 4), level=st.floats(-5, 5))
def test_padding_and_level_change_no_listwise_loss(seed: int, padding: int, level: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits, parents = torch.randn(2, 2, 5, generator=generator)
    gains = torch.rand(2, 5, generator=generator).round(decimals=1)
    shown, real = flags("11100", "11110"), flags("11111", "11110")
    wide = [torch.nn.functional.pad(part, (0, padding)) for part in (logits + level, gains, shown, real, parents)]
    wide[0] = wide[0] + torch.nn.functional.pad(torch.zeros(2, 5), (0, padding), value=99.0)  # noise where nothing is
    plain = listwise_loss(logits, gains, shown, real, unshown_weight=0.3)
    padded = listwise_loss(*wide[:4], unshown_weight=0.3)
    torch.testing.assert_close(plain, padded, atol=1e-4, rtol=1e-4)
    everywhere = torch.tensor([True, True])
    plain = parent_loss(logits, parents, real, everywhere)
    padded = parent_loss(wide[0], wide[4], wide[3], everywhere)
    torch.testing.assert_close(plain, padded, atol=1e-4, rtol=1e-4)


def test_pointwise_loss_counts_what_was_shown_as_often_as_its_slate_weighs() -> None:
    logits = torch.tensor([[0.0, 3.0], [1.0, -50.0]])
    clicked = flags("10", "01")
    loss = pointwise_loss(logits, clicked, flags("11", "10"), torch.tensor([1.0, 4.0]))
    of_items = [math.log(2), math.log(1 + math.e**3), 4 * math.log(1 + math.e)]
    assert float(loss) == pytest.approx(sum(of_items) / 6, abs=1e-5)


def test_pointwise_loss_is_least_at_the_log_odds() -> None:
    clicked = flags("1000")

    def at(logit: float) -> float:
        return float(pointwise_loss(torch.full((1, 4), logit), clicked, flags("1111"), torch.ones(1)))

    best = math.log(1 / 3)
    assert at(best) < min(at(best - 0.1), at(best + 0.1))


def test_what_was_not_rated_teaches_no_rating() -> None:
    predicted = torch.tensor([[3.0, 4.0, 2.0]], requires_grad=True)
    loss = rating_loss(predicted, torch.tensor([[5.0, NAN, NAN]]))
    loss.backward()
    assert float(loss) == 4.0
    assert predicted.grad is not None
    assert predicted.grad.tolist() == [[-4.0, 0.0, 0.0]]


def test_parent_loss_is_the_divergence_on_replayed_slates_only() -> None:
    logits, parents = torch.tensor([[0.0, 1.0], [5.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    loss = parent_loss(logits, parents, flags("11", "11"), torch.tensor([True, False]))
    p, q = torch.softmax(parents[0], 0), torch.softmax(logits[0], 0)
    torch.testing.assert_close(loss, (p * (p / q).log()).sum())
    assert float(parent_loss(parents, parents, flags("11", "11"), torch.tensor([True, True]))) == pytest.approx(0)


@pytest.mark.parametrize("top", [3, 10])
def test_ndcg_equals_scikit_learn(top: int) -> None:
    rng = np.random.default_rng(3)
    scores, gains = rng.normal(size=(20, 7)).astype(np.float32), rng.integers(0, 4, (20, 7)).astype(np.float32)
    gains[:, 0] += 1
    found = ndcg(torch.from_numpy(scores), torch.from_numpy(gains), torch.ones(20, 7, dtype=torch.bool), top=top)
    assert found.mean().item() == pytest.approx(ndcg_score(gains, scores, k=top), abs=1e-5)


def test_ndcg_is_over_what_was_shown_and_no_number_without_a_gain() -> None:
    logits = torch.tensor([[1.0, 2.0, 9.0], [1.0, 2.0, 3.0]])
    found = ndcg(logits, torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]), flags("110", "110"))
    assert found[0] == 1.0
    assert found[1].isnan()
