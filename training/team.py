"""Who learns together: processes that read and score a share of the examples each, and add up what they find.

Everyone has every label and sees every score, so each computes the loss of the whole batch, whatever that loss is a
mean over. Its gradient reaches the weights through a process's own scores alone: the sum of all is what one process
would have found. A process alone is a team of one, which sends nothing.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, distributed


@dataclass(frozen=True)
class Team:
    """The place of this process among those that learn the same thing: `rank`, from 0, of `size`."""

    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        """Whether this process writes for all: checkpoints, and what trackers are told."""
        return self.rank == 0

    def owns(self, number: int) -> bool:
        """Whether it is this process that reads and scores the example of that number."""
        return number % self.size == self.rank

    def add_up(self, tensor: Tensor) -> Tensor:
        """Returns the sum of everyone's tensor, the same to the bit for all; it may be written in place."""
        if self.size > 1:
            distributed.all_reduce(tensor)
        return tensor

    def share_scores(self, scores: Tensor) -> Tensor:
        """Returns everyone's scores, of which each has its own and zeros elsewhere; gradients reach only the own."""
        if self.size == 1:
            return scores
        return self.add_up(scores.detach().clone()) + (scores - scores.detach())

    def count_once(self, loss: Tensor) -> Tensor:
        """Returns a loss that everyone finds alike from the weights themselves; gradients are each one's share."""
        return loss if self.size == 1 else loss.detach() + (loss - loss.detach()) / self.size

    def add_up_gradients(self, weights: Iterable[Tensor]) -> None:
        """Gives every weight the sum of its gradients, in place."""
        if self.size == 1:
            return
        held = list(weights)
        gradients = [torch.zeros_like(weight) if weight.grad is None else weight.grad for weight in held]
        total = self.add_up(torch.cat([gradient.flatten() for gradient in gradients]))
        for weight, part in zip(held, torch.split(total, [weight.numel() for weight in held]), strict=True):
            weight.grad = part.view_as(weight)


ALONE = Team()


def join_team() -> Team:
    """Returns the place of this process in torch's process group, which whoever started the process has set up."""
    return Team(distributed.get_rank(), distributed.get_world_size())
