"""What fine-tuning minimises, as pure functions of logits and labels.

Shapes: B slates, N candidates, padded; float32 unless said otherwise. Every function returns one number: 0 where no
slate has anything to say on the matter, and then no gradient either.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize
from torch import Tensor

_NEVER = -1e9  # the logit of what is not there: far below any real one, and finite, so that 0 times it is 0


def listwise_loss(
    logits_BN: Tensor, gains_BN: Tensor, shown_BN: Tensor, real_BN: Tensor, *, unshown_weight: float
) -> Tensor:
    """Returns the softmax cross entropy of the gains of what was shown, mean over the slates that have a gain.

    ListNet with top-one probabilities (Cao et al. 2007, "Learning to rank: from pairwise to listwise approach"), the
    target being the share of each item in the slate's gain. Candidates that were not shown stand in the denominator
    only, each counted `unshown_weight` times: nobody said that they were worse. Masks are boolean; add the position
    bias to the logits before.
    """
    counted = torch.where(shown_BN, 1.0, unshown_weight) * real_BN
    gains = gains_BN * shown_BN
    total = gains.sum(1)
    taught = total > 0
    log_counted = torch.where(counted > 0, counted.clamp(min=1e-9).log(), _NEVER)
    log_sum = torch.logsumexp(logits_BN + log_counted, 1, keepdim=True)
    share = gains / total.clamp(min=1e-9).unsqueeze(1)
    per_slate = (share * (log_sum - logits_BN)).sum(1)
    return (per_slate * taught).sum() / taught.sum().clamp(min=1)


def pointwise_loss(logits_BN: Tensor, clicked_BN: Tensor, shown_BN: Tensor, weights_B: Tensor) -> Tensor:
    """Returns the log loss of clicks on what was shown, mean over the items shown, those of a slate weighing as told.

    Beside a listwise loss, which leaves a slate's level open, it makes logits mean log odds (Yan et al. 2022, "Scale
    calibration of deep ranking models"). `weights_B` undoes a sampling of slates: 1 over the chance of being kept.
    """
    losses = torch.nn.functional.binary_cross_entropy_with_logits(
        logits_BN, clicked_BN.to(logits_BN.dtype), reduction="none"
    )
    counted = shown_BN * weights_B.unsqueeze(1)
    return (losses * counted).sum() / counted.sum().clamp(min=1)


def rating_loss(predicted_BN: Tensor, ratings_BN: Tensor) -> Tensor:
    """Returns the mean squared error on the items that were rated, in stars squared; NaN means not rated."""
    rated = ~torch.isnan(ratings_BN)
    errors = (predicted_BN - torch.where(rated, ratings_BN, predicted_BN.detach())) ** 2
    return errors.sum() / rated.sum().clamp(min=1)


def parent_loss(logits_BN: Tensor, parent_logits_BN: Tensor, real_BN: Tensor, replayed_B: Tensor) -> Tensor:
    """Returns the KL divergence of the model's softmax over a slate's candidates from its parent's, mean over replays.

    Learning without forgetting (Li and Hoiem 2016): on older impressions the new model should still say what the old
    one said, unless what is new speaks against it. Level and slates that are not replayed do not count.
    """
    log_model = torch.log_softmax(torch.where(real_BN, logits_BN, _NEVER), 1)
    log_parent = torch.log_softmax(torch.where(real_BN, parent_logits_BN, _NEVER), 1)
    per_slate = (log_parent.exp() * (log_parent - log_model)).sum(1)
    return (per_slate * replayed_B).sum() / replayed_B.sum().clamp(min=1)


def anchor_loss(weights: Mapping[str, Tensor], anchors: Mapping[str, Tensor]) -> Tensor:
    """Returns half the squared distance of the weights from where they began, by name, summed over the anchors.

    L2-SP (Li, Grandvalet and Davoine 2018, "Explicit inductive bias for transfer learning"). Divided by the number of
    examples it is the prior of one who expects the parent to be nearly right: few examples move it little.
    """
    return torch.stack([((weights[name] - anchor) ** 2).sum() for name, anchor in anchors.items()]).sum() / 2


def best_factors(
    parts_PBN: Tensor,
    gains_BN: Tensor,
    shown_BN: Tensor,
    real_BN: Tensor,
    bias_BN: Tensor,
    bounds: Sequence[tuple[float, float]],
    *,
    unshown_weight: float,
    pull: float = 0.0,
) -> list[float]:
    """Returns by how much to multiply each of P parts of the logits for their sum to explain the gains best; else ones.

    Temperature scaling (Guo et al. 2017, "On calibration of modern neural networks"), of one part or of several. The
    loss is convex in the factors, each of which stays within its bounds. With `pull` they are expected to be 1, with
    this inverse variance. The position bias, which is added afterwards, stays as it is.
    """
    taught = max(int(((gains_BN * shown_BN).sum(1) > 0).sum()), 1)
    parts_PBN, bias_BN = parts_PBN.double(), bias_BN.double()

    def loss(factors_P: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        factors = torch.from_numpy(factors_P).to(parts_PBN.device).requires_grad_()
        logits_BN = torch.tensordot(factors, parts_PBN, dims=1) + bias_BN
        found = listwise_loss(logits_BN, gains_BN, shown_BN, real_BN, unshown_weight=unshown_weight)
        found = found + pull * ((factors - 1) ** 2).sum() / 2 / taught
        found.backward()  # type: ignore[no-untyped-call]
        return found.item(), np.zeros(len(factors)) if factors.grad is None else factors.grad.cpu().numpy()

    ones = np.ones(len(parts_PBN))
    found = minimize(loss, ones, jac=True, method="L-BFGS-B", bounds=list(bounds))
    return [float(factor) for factor in (found.x if found.fun < loss(ones)[0] else ones)]


def ndcg(logits_BN: Tensor, gains_BN: Tensor, shown_BN: Tensor, *, top: int = 10) -> Tensor:
    """Returns [B] NDCG at `top` of what was shown, ordered by logit, with linear gains; NaN for slates without gain."""
    gains = gains_BN * shown_BN
    top = min(top, gains.shape[1])
    discount = 1 / torch.log2(torch.arange(top, device=gains.device, dtype=torch.float32) + 2)
    order = torch.where(shown_BN, logits_BN, -torch.inf).sort(dim=1, descending=True, stable=True).indices
    reached = (gains.gather(1, order)[:, :top] * discount).sum(1)
    ideal = (gains.sort(1, descending=True).values[:, :top] * discount).sum(1)
    return reached / torch.where(ideal > 0, ideal, torch.nan)
