"""What the layers that do not learn say of an example, and how a bundle that serves says it.

Where the head alone learns it may read from the graphs that are there, which quantize as they will in serving: on a
CPU without AMX that also takes about half the time of the same layers in torch.

Shapes: N candidates, U user tokens, T states per item, H hidden size.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from training.examples import Example
from training.rescoring import BundleScorer, encode_texts


class Reading(NamedTuple):
    """One example before the first layer that learns: float16 states of its user [U,H] and its candidates [N,T,H].

    With no layer left to learn a candidate has one state, the mean, and a user none.
    """

    users: Tensor
    states: Tensor
    vector: Tensor  # float32 [H]: the user's


class ServedReader:
    """Reads examples as a bundle serves them: one at a time, because int8 activations of a call share their scales."""

    def __init__(self, scorer: BundleScorer, examples: Sequence[Example], *, threads: int) -> None:
        """Encodes every candidate's text once; only of these examples can it tell."""
        self._scorer = scorer
        self._items = encode_texts(scorer, examples, threads=threads)

    def read(self, example: Example) -> Reading:
        """Returns what the head is given of an example, on the CPU."""
        users, rows = self._scorer.encode_users([example.user_text]), self._items.rows(example.texts)
        pooled_1NH = self._scorer.pool(users, self._items.states_MTH[rows][None], self._items.mask_MT[rows][None])
        states = torch.from_numpy(pooled_1NH[0]).half().unsqueeze(-2)
        return Reading(states.new_zeros(0, states.shape[-1]), states, torch.from_numpy(users.vectors_BD[0]))
