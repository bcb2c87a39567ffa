"""Who learns together: processes that read and score a share of the examples each, and add up what they find.

Everyone has every label and sees every score, so each computes the loss of the whole batch, whatever that loss is a
mean over. Its gradient reaches the weights through a process's own scores alone: the sum of all is what one process
would have found. A process alone is a team of one, which sends nothing.
"""

import os
import socket
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Literal

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

    def as_leader(self, tensor: Tensor) -> Tensor:
        """Returns the first one's tensor to all: what each computes for itself differs by rounding between machines."""
        return self.add_up(tensor.clone() if self.leads else torch.zeros_like(tensor)) if self.size > 1 else tensor

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


@contextmanager
def joined_team(
    rank: int,
    size: int,
    *,
    host: str,
    backend: Literal["gloo", "nccl"],
    agree: Callable[[tuple[str, int]], tuple[str, int]],
) -> Iterator[Team]:
    """Joins this process to its team while the block lasts. `host` is the address by which the others reach it.

    All meet where the first says: `agree` returns to everyone what the first gave it. Left to itself torch listens for
    them on every interface.
    """
    if ip_address(host).is_loopback:
        loopback = next(name for _, name in socket.if_nameindex() if name.startswith("lo"))
        os.environ |= {"GLOO_SOCKET_IFNAME": loopback, "NCCL_SOCKET_IFNAME": loopback}
    leads = rank == 0
    with socket.create_server((host, 0)) as listener:
        meeting_host, port = agree(listener.getsockname()[:2])
        store = distributed.TCPStore(  # type: ignore[attr-defined]  # public, but not named in the module's exports
            meeting_host, port, size, is_master=leads, master_listen_fd=listener.detach() if leads else None
        )
    distributed.init_process_group(backend, store=store, rank=rank, world_size=size)
    try:
        yield Team(rank, size)
    finally:
        distributed.destroy_process_group()
