"""Several workers through Ray Train: what they learn together, and what becomes of it when one is killed."""

import os
import signal
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from deploy.learning_team import learn_together
from deploy.ray_cluster import ray_cluster
from tests.servers import listening_beyond_loopback
from tests.unit.test_fine_tune import change
from tests.unit.test_team import make_job, without_key_biases
from training.fine_tune import FineTuned, Job, learn_alone
from training.team import Team

SETTINGS = change(workers=2, epochs=2, trainable_layers=1, dropout=0.0)


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    """A Ray cluster on this machine."""
    with ray_cluster():
        yield


@dataclass(frozen=True)
class KilledOnce:
    """A job whose first worker, which writes the checkpoints, is killed the first time it has come so far.

    Just before, it writes to `exposed` which ports the team and its Ray let other machines reach.
    """

    job: Job
    at_step: int
    folder: Path
    root_pid: int

    @property
    def exposed(self) -> Path:
        """Where the ports are written to."""
        return self.folder / "exposed"

    def __call__(self, *, team: Team) -> FineTuned:
        """Returns what the job does, the second time."""

        def die(what: str, done: int, total: int) -> None:
            been_here = self.folder / "been-here"
            if what == "learn" and done == self.at_step and not been_here.exists():
                been_here.touch()
                self.exposed.write_text("\n".join(listening_beyond_loopback(self.root_pid)))
                os.kill(os.getpid(), signal.SIGKILL)

        return partial(self.job, progress=die, checkpoint_every_s=0.0)(team=team)


@pytest.mark.timeout(600)  # two starts of a team, niced
def test_worker_killed_while_learning_is_replaced_and_all_end_with_the_weights_of_one(tmp_path: Path) -> None:
    job = KilledOnce(make_job(tmp_path / "together", SETTINGS), at_step=12, folder=tmp_path, root_pid=os.getpid())
    together = learn_together(job, SETTINGS, tmp_path / "ray")
    alone = learn_alone(make_job(tmp_path / "alone", SETTINGS))
    assert (together.resumed, alone.resumed) == (True, False)
    assert [r.losses for r in together.history] == [pytest.approx(r.losses, rel=1e-4) for r in alone.history]
    assert job.exposed.read_text() == ""
    found, expected = together.ranker.state_dict(), alone.ranker.state_dict()
    for name, weight in found.items():
        torch.testing.assert_close(
            without_key_biases(name, weight), without_key_biases(name, expected[name]), atol=1e-5, rtol=1e-4
        )
    for values, wanted in zip(astuple(together.ranker.taste_model), astuple(alone.ranker.taste_model), strict=True):
        np.testing.assert_allclose(values, wanted, rtol=1e-4, atol=1e-5)
    assert not (tmp_path / "ray").exists()
