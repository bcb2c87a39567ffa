"""Low-rank adapters: few weights that learn beside frozen ones, and are folded into them at the end.

Hu et al. 2021, "LoRA: low-rank adaptation of large language models", arXiv 2106.09685: a product with W becomes a
product with W + up @ down. Adapted are queries and values, as in that paper, and the feed-forward pair. The frozen
product needs no weight gradient, which is a third of a layer's work.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from training.bert import BertLayer

_ADAPTED = ("query_key_value", "widen", "narrow")


class LowRank(nn.Module):
    """A frozen linear layer plus a product of two thin matrices, which starts at zero.

    `outputs` names the rows of the weight that are adapted, as (start, stop): each gets `rank` directions of its own.
    """

    fold: Tensor

    def __init__(self, plain: nn.Linear, rank: int, outputs: Sequence[tuple[int, int]]) -> None:
        super().__init__()
        self.plain = plain.requires_grad_(False)
        width = rank * len(outputs)
        self.down = nn.Parameter(torch.randn(width, plain.in_features) * plain.in_features**-0.5)
        self.up = nn.Parameter(torch.zeros(plain.out_features, width))
        fold = torch.zeros(plain.out_features, width)
        for index, (start, stop) in enumerate(outputs):
            fold[start:stop, index * rank : (index + 1) * rank] = 1.0
        self.register_buffer("fold", fold)  # which part of `up` may differ from zero

    def forward(self, states: Tensor) -> Tensor:
        """Returns what a linear layer with the merged weight returns, within float noise."""
        low = nn.functional.linear(states, self.down)
        adapted: Tensor = self.plain(states) + nn.functional.linear(low, self.up * self.fold)
        return adapted

    def merged_weight(self) -> Tensor:
        """Returns the weight of the one linear layer that does the same."""
        return (self.plain.weight + (self.up * self.fold) @ self.down).detach()


def adapt_layers(layers: Sequence[BertLayer], rank: int) -> None:
    """Puts adapters of that rank into the layers, in place; everything else of the layers is frozen."""
    for layer in layers:
        layer.requires_grad_(False)
        for name in _ADAPTED:
            plain = getattr(layer, name)
            hidden, rows = plain.in_features, plain.out_features
            # Queries, keys and values are one weight: its first and its last third.
            outputs = [(0, hidden), (2 * hidden, rows)] if name == "query_key_value" else [(0, rows)]
            setattr(layer, name, LowRank(plain, rank, outputs))


def merge_layers(layers: Sequence[BertLayer]) -> None:
    """Replaces the adapters in the layers by plain linear layers that do the same, in place."""
    for layer in layers:
        for name in _ADAPTED:
            adapter = getattr(layer, name)
            if isinstance(adapter, LowRank):
                with torch.no_grad():
                    adapter.plain.weight.copy_(adapter.merged_weight())
                setattr(layer, name, adapter.plain)
