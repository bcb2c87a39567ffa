"""What a model reads of packed impressions, and what became of them, as tensors.

Shapes: B impressions, N candidates, U user tokens, T states per item, H hidden size, F features.
"""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class Batch:
    """What a model reads of B packed impressions, padded. States are those before the first layer that learns."""

    users: Tensor  # float32 [B,U,H]; none of them (U = 0) where no layer learns
    user_vectors: Tensor  # float32 [B,H]
    user_mask: Tensor  # int64 [B,U]
    states: Tensor  # float32 [B,N,T,H]
    state_mask: Tensor  # int64 [B,N,T]
    features: Tensor  # float32 [B,N,F], in standard units
    tag_worth: Tensor  # float32 [B,N], under the model's own knowledge of tastes
    real: Tensor  # bool [B,N]


@dataclass(frozen=True, slots=True)
class Labels:
    """What became of B impressions, padded alike."""

    real: Tensor  # bool [B,N]
    shown: Tensor  # bool [B,N]
    gains: Tensor  # float32 [B,N]
    clicked: Tensor  # bool [B,N]
    ratings: Tensor  # float32 [B,N], NaN where not rated
    weights: Tensor  # float32 [B]
    arrived: Tensor  # float32 [B]: the share of their clicks that had come
    replayed: Tensor  # bool [B]
