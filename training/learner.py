"""A ranker while it learns: which of its weights do, in which units, and what is there in training only.

Shapes: B slates, N candidates, T states per item, H hidden size, F features, K positions.
"""

from collections.abc import Mapping
from contextlib import nullcontext

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from training.batches import Batch
from training.bert import BertLayer
from training.head import Head
from training.lora import LowRank, adapt_layers
from training.model import SplitRanker
from training.precision import Precision

_FLAT = 1e-3  # a feature that varies less than this says nothing yet: its unit stays 1
_RARE = 0.01  # and so it does where no more of its values than this differ from the usual one


class Learner(nn.Module):
    """A ranker of which the head and the layers from `first_layer` on learn, and a bias per position that is not kept.

    The head's linear part does not, step by step: slates span little of what could stand on them, and a sum over raw
    features that was fitted there goes straight on to where nobody has looked. What its parts are worth is found at
    once (`training.first_step`); what else there is to know the network learns, whose features are cut.

    The bias takes up how much a place in the slate adds to a click, so that the head need not (Guo et al. 2019, "PAL:
    a position-bias aware learning framework"). It is 0 at the first place: logits mean what they would there.
    """

    def __init__(
        self, ranker: SplitRanker, first_layer: int, *, num_positions: int, lora_rank: int = 0, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.ranker = ranker
        self.first_layer = first_layer
        upper = self.layers
        ranker.eval().requires_grad_(False)
        ranker.head.requires_grad_(True)
        ranker.head.prior.requires_grad_(False)
        for layer in upper:
            layer.requires_grad_(True)
            layer.dropout.p = layer.weight_dropout.p = dropout
        if lora_rank:
            adapt_layers(upper, lora_rank)
        self.position_bias = nn.Parameter(torch.zeros(max(num_positions - 1, 0)))

    @property
    def layers(self) -> list[BertLayer]:
        """The layers that learn, lowest first."""
        return self.ranker.upper[self.first_layer - self.ranker.split_layer :]

    def train(self, mode: bool = True) -> "Learner":
        """Turns dropout on in the layers that learn, and nowhere else."""
        super().train(False)
        for layer in self.layers:
            layer.train(mode)
        self.training = mode
        return self

    def forward(self, batch: Batch, precision: Precision = nullcontext) -> tuple[Tensor, Tensor]:
        """Returns click logits [B,N], without position bias, and ratings [B,N]. The head always works in float32."""
        with precision():
            _, states = self.ranker.advance(
                batch.users,
                batch.user_mask,
                batch.states,
                batch.state_mask,
                self.first_layer,
                len(self.ranker.bert.stack),
            )
        return self.ranker.judge(batch.user_vectors, states.float(), batch.state_mask, batch.features, batch.tag_worth)

    def place_bias(self, shown: Tensor) -> Tensor:
        """Returns [B,N], to be added to the logits: what each candidate's place adds, 0 where it was not shown."""
        by_place = torch.cat([self.position_bias.new_zeros(1), self.position_bias])
        places = torch.arange(shown.shape[1], device=shown.device).clamp(max=len(by_place) - 1)
        return by_place[places] * shown

    def expect_places(self, seen_K: NDArray[np.float64]) -> None:
        """Sets the position bias to what it is where each of the K positions is looked at with so much of a chance."""
        with torch.no_grad():
            self.position_bias.copy_(torch.from_numpy(np.log(seen_K[1:] / seen_K[0])))

    def learned(self) -> dict[str, Tensor]:
        """Returns copies of the weights that learn, under the names of a plain ranker, and the position bias."""
        weights: dict[str, Tensor] = {"position_bias": self.position_bias}
        weights |= {f"head.{name}": weight for name, weight in self.ranker.head.named_parameters()}
        for index, layer in enumerate(self.layers, self.first_layer - self.ranker.split_layer):
            prefix = f"ranking.{index}."
            weights |= {f"{prefix}{name}": w for name, w in layer.named_parameters() if not _of_adapter(name)}
            for name, part in layer.named_children():
                if isinstance(part, LowRank):
                    weights[f"{prefix}{name}.weight"] = part.merged_weight()
                    weights[f"{prefix}{name}.bias"] = part.plain.bias
        return {name: weight.detach().clone() for name, weight in weights.items()}


def put_learned(ranker: SplitRanker, learned: Mapping[str, Tensor]) -> None:
    """Writes what `Learner.learned` returned into a plain ranker, in place."""
    state = {name: weight for name, weight in learned.items() if name != "position_bias"}
    unexpected = ranker.load_state_dict(state, strict=False).unexpected_keys
    assert not unexpected, f"a plain ranker has no {', '.join(unexpected)}"


def feature_units(head: Head, features_RF: NDArray[np.float32]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Returns the mean and the standard deviation [F] by which features become standard.

    A feature's come from the first round, or the first in which the network may learn from it; where it hardly varies
    then, its unit is 1. Later ones keep what is there, for the weights of the head's inner layer mean so much per unit:
    with other units they would be another function, and the warm start would be lost.
    """
    mean, std = head.feature_mean.cpu().double().numpy(), head.feature_std.cpu().double().numpy()
    new_F = np.full(len(mean), True) if _without_units(head) else _silent(head)
    if len(features_RF) and new_F.any():
        found = features_RF[:, new_F].astype(np.float64)
        found_std = np.where(_nearly_flat(found), 1.0, found.std(0))
        # Rounded to what the head will hold, so that both coordinates agree.
        mean[new_F], std[new_F] = (one.astype(np.float32).astype(np.float64) for one in (found.mean(0), found_std))
    return mean, std


def never_vary(features_RF: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Returns which features [F] are the same in every row."""
    flat_F: NDArray[np.bool_] = np.ptp(features_RF, axis=0) < _FLAT
    return flat_F


def silence(head: Head, flat_F: NDArray[np.bool_]) -> None:
    """Takes the network's initial weights, in place and before it has learned, from features that never vary.

    Nothing will teach those weights before the feature changes, on the first weekend say; and on that day they would
    be heard, whatever they happen to be. At 0 they stay as they are until there is something to learn.
    """
    if _without_units(head):
        _feature_columns(head)[:, torch.from_numpy(flat_F)] = 0.0


def to_standard_units(head: Head, mean: NDArray[np.float64], std: NDArray[np.float64]) -> None:
    """Rewrites the head, in place, so that it says the same of standardised features as it did of raw ones.

    The prior weighs raw numbers of any size; one rate of learning suits them all only once they have one unit.
    """
    _set_units(head, np.zeros_like(mean), np.ones_like(std))
    prior = head.prior.detach().cpu().double().numpy()
    _shift(head, float(prior @ mean))
    _set(head.prior, prior * std)


def to_raw_units(head: Head, mean: NDArray[np.float64], std: NDArray[np.float64]) -> None:
    """Undoes `to_standard_units`, in place: the head takes raw features again, and standardises by these units."""
    _set_units(head, mean, std)
    prior = head.prior.detach().cpu().double().numpy() / std
    _shift(head, -float(prior @ mean))
    _set(head.prior, prior)


def _of_adapter(name: str) -> bool:
    return any(part in name.split(".") for part in ("plain", "up", "down"))


def _without_units(head: Head) -> bool:
    """Whether no round has learned yet, so that the inner layer's weights are whatever they were drawn as."""
    return not head.feature_mean.any() and bool((head.feature_std == 1).all())


def _nearly_flat(features_RF: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Whether a feature is nearly always the same: by what few rows differ one would measure them far too large."""
    rare_F = (features_RF != np.median(features_RF, axis=0)).mean(0) < _RARE
    result: NDArray[np.bool_] = rare_F | (features_RF.std(0) < _FLAT)
    return result


def _silent(head: Head) -> NDArray[np.bool_]:
    """Returns which features [F] the network makes nothing of: they have not varied yet, where it has learned."""
    silent_F: NDArray[np.bool_] = (_feature_columns(head) == 0).all(0).cpu().numpy()
    return silent_F


def _feature_columns(head: Head) -> Tensor:
    """Returns the inner layer's weights of features, a view [W,F] of them: W is its width."""
    return head.inner.weight.detach()[:, -len(head.prior) :]


def _set_units(head: Head, mean: NDArray[np.float64], std: NDArray[np.float64]) -> None:
    _set(head.feature_mean, mean)
    _set(head.feature_std, std)


def _shift(head: Head, constant: float) -> None:
    """Moves a constant out of the prior's sum: the click logit and the rating both start from that sum."""
    with torch.no_grad():
        head.outer.bias[0] += constant
        head.rating_affine[1] += head.rating_affine[0] * constant


def _set(target: Tensor, values: NDArray[np.float64]) -> None:
    with torch.no_grad():
        target.copy_(torch.from_numpy(values))
