"""Two processes that learn together find what one finds: losses, stop figures and weights."""

import multiprocessing
from functools import partial
from multiprocessing.queues import Queue
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tailrace.settings import TrainingSettings
from tests.unit.test_fine_tune import by_cosine, by_word, change, make_examples, never, small_ranker, tokenizer
from training.checkpoints import EpochRecord
from training.fine_tune import FineTuned, Job, fine_tune, learn_alone
from training.team import joined_team

KINDS = {
    "head": change(epochs=2),
    "layers": change(epochs=2, trainable_layers=2, dropout=0.0),
    "adapters": change(epochs=2, trainable_layers=1, dropout=0.0, lora_rank=2),
    "batches of one": change(epochs=1, batch=1, trainable_layers=1, dropout=0.0),
}


def make_job(folder: Path, settings: TrainingSettings) -> Job:
    """A fine-tune in which every loss has something to say, and no share of a batch says as much as the other."""
    return partial(
        fine_tune,
        small_ranker(),
        tokenizer(),
        make_examples(45, by_word, seed=1, rated=True) + make_examples(30, never, seed=4, num_shown=3),
        make_examples(21, by_word, seed=2),
        make_examples(20, by_cosine, seed=3),
        settings,
        max_user_tokens=16,
        max_item_tokens=8,
        folder=folder,
    )


def figures(history: list[EpochRecord]) -> dict[str, Tensor]:
    """All that a fine-tune says of its epochs but the time it took."""
    return {
        f"{record.epoch}/{name}": torch.tensor(figure, dtype=torch.float64)
        for record in history
        for name, figure in {
            **record.losses,
            "stop loss": record.stop_loss or 0.0,
            "parent's": record.parent_stop_loss or 0.0,
            "NDCG@10": record.stop_ndcg_10 or 0.0,
        }.items()
    }


def without_key_biases(name: str, weight: Tensor) -> Tensor:
    """What can be compared: keys' biases cancel in a softmax, so their gradient is noise, which Adam makes steps of."""
    return weight.view(3, -1)[[0, 2]] if name.endswith("query_key_value.bias") else weight


def weights_of(found: FineTuned) -> dict[str, Tensor]:
    """All that was learned, of tastes too."""
    known = found.ranker.taste_model
    tastes = {"tastes.mean": known.mean_T, "tastes.covariance": known.covariance_TT, "tastes.rate": known.rate_T}
    return found.ranker.state_dict() | {name: torch.from_numpy(values) for name, values in tastes.items()}


def learn_in_a_process(folder: Path, rank: int, meeting: "Queue[tuple[str, int]]") -> None:
    def agree(mine: tuple[str, int]) -> tuple[str, int]:
        if rank == 0:
            meeting.put(mine)
            return mine
        return meeting.get(timeout=60)

    torch.set_num_threads(1)
    with joined_team(rank, 2, host="127.0.0.1", backend="gloo", agree=agree) as team:
        for kind, settings in KINDS.items():
            found = make_job(folder / kind, settings)(team=team)
            save_file(weights_of(found) | figures(found.history), folder / f"{kind}-{rank}")


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where both of two processes have left what they found."""
    folder = tmp_path_factory.mktemp("team")
    context = multiprocessing.get_context("spawn")
    meeting = context.Queue()
    members = [
        context.Process(target=learn_in_a_process, args=(folder, rank, meeting), daemon=True) for rank in range(2)
    ]
    for member in members:
        member.start()
    for member in members:
        member.join(240)
    assert [member.exitcode for member in members] == [0, 0]
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_two_that_learn_together_find_what_one_finds(together: Path, tmp_path: Path, kind: str) -> None:
    found = learn_alone(make_job(tmp_path, KINDS[kind]))
    alone = weights_of(found) | figures(found.history)
    first, second = (load_file(together / f"{kind}-{rank}") for rank in range(2))
    for name, expected in alone.items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(
            without_key_biases(name, first[name]), without_key_biases(name, expected), atol=1e-5, rtol=1e-4
        )
