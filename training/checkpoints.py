"""Where a fine-tune stands, on disk: weights, optimizer, the best epochs so far. safetensors, nothing is unpickled.

No state of a random generator is kept because none is needed: the order of an epoch follows from the seed and the
epoch, the dropout of a step from the seed and the step.
"""

from collections.abc import Mapping
from pathlib import Path

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

CHECKPOINT_FILE = "checkpoint.safetensors"


class EpochRecord(msgspec.Struct, frozen=True):
    """What one pass over the examples came to. Losses are means over its steps; `stop_` figures are of the stop slice.

    `parent_stop_loss` is the parent's under the same position bias. None where no slate of the slice has a gain.
    """

    epoch: int
    losses: dict[str, float]
    stop_loss: float | None
    parent_stop_loss: float | None
    stop_ndcg_10: float | None
    took_s: float


class Standing(msgspec.Struct):
    """How far a fine-tune has come. `step` counts all steps done; `totals` are the losses summed in this epoch."""

    fingerprint: str
    step: int = 0
    history: list[EpochRecord] = []
    totals: dict[str, float] = {}
    best: list[tuple[float, int]] = []  # stop loss and epoch of each snapshot kept, best first


def save_checkpoint(
    folder: Path,
    standing: Standing,
    parameters: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer,
    snapshots: Mapping[int, Mapping[str, Tensor]],
) -> None:
    """Writes the checkpoint, in one move: a kill leaves the old one or the new one. Snapshots are keyed by epoch."""
    tensors = {f"learn/{name}": weight.detach().cpu() for name, weight in parameters.items()}
    for name, weight in parameters.items():
        for part, value in optimizer.state.get(weight, {}).items():
            tensors[f"adam/{part}/{name}"] = value.detach().cpu()
    for epoch, snapshot in snapshots.items():
        tensors |= {f"best/{epoch}/{name}": weight.cpu() for name, weight in snapshot.items()}
    folder.mkdir(parents=True, exist_ok=True)
    aside = folder / f"{CHECKPOINT_FILE}.part"
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        aside,
        metadata={"standing": msgspec.json.encode(standing).decode()},
    )
    aside.replace(folder / CHECKPOINT_FILE)


def load_checkpoint(
    folder: Path, fingerprint: str, parameters: Mapping[str, Tensor], optimizer: torch.optim.Optimizer
) -> tuple[Standing, dict[int, dict[str, Tensor]]] | None:
    """Puts a checkpoint of this very fine-tune back, and returns where it stood and its snapshots; None without one.

    What is damaged, or belongs to other examples, settings or weights, counts as none: the work is then done again.
    """
    try:
        with safe_open(folder / CHECKPOINT_FILE, framework="pt") as file:
            standing = msgspec.json.decode((file.metadata() or {})["standing"], type=Standing)
            if standing.fingerprint != fingerprint:
                return None
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
    except (OSError, SafetensorError, KeyError, msgspec.DecodeError):
        return None
    device = next(iter(parameters.values())).device
    with torch.no_grad():
        for name, weight in parameters.items():
            weight.copy_(tensors[f"learn/{name}"])
            parts = [key for key in tensors if key.startswith("adam/") and key.split("/", 2)[2] == name]
            optimizer.state[weight] = {key.split("/", 2)[1]: tensors[key].to(weight.device) for key in parts}
    snapshots: dict[int, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        if key.startswith("best/"):
            _, epoch, name = key.split("/", 2)
            snapshots.setdefault(int(epoch), {})[name] = tensor.to(device)
    return standing, snapshots
