"""Learning in several processes, through Ray Train: who is started, what each is given, and what comes back."""

import os
import shutil
from pathlib import Path
from typing import Any
from uuid import uuid4

import ray
from ray.train import get_context
from ray.train.collective import broadcast_from_rank_zero
from ray.train.v2.api.config import FailureConfig, RunConfig, ScalingConfig
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from deploy.ray_cluster import NICE
from tailrace.errors import TailraceError
from tailrace.settings import TrainingSettings
from training.fine_tune import FineTuned, Job
from training.team import joined_team

_RETRIES = 3  # a worker that dies, or finds no room to start, is started again so often


def learn_together(job: Job, settings: TrainingSettings, folder: Path) -> FineTuned:
    """Returns what `settings.workers` processes come to, each of which does the job as one of a team.

    Where one dies all begin again, from the job's last checkpoint. Ray Train keeps its own books in `folder`, which is
    removed at the end. Raises what the job raises.
    """
    trainer = DataParallelTrainer(  # not TorchTrainer, whose processes meet on every interface
        _do_share,
        train_loop_config={"job": ray.put(job), "backend": "nccl" if settings.device == "cuda" else "gloo"},
        scaling_config=ScalingConfig(
            num_workers=settings.workers,
            use_gpu=settings.device == "cuda",
            resources_per_worker={"CPU": settings.num_cpus},
            placement_strategy="SPREAD",
        ),
        run_config=RunConfig(  # type: ignore[arg-type]  # annotated as the class of Ray Train's first version
            name=uuid4().hex,  # a name used before would train nothing: checkpoints are the job's business
            storage_path=str(folder),
            failure_config=FailureConfig(max_failures=_RETRIES, controller_failure_limit=_RETRIES),
        ),
    )
    try:
        result: Any = trainer.fit()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    found: FineTuned | Exception = result.return_value
    if isinstance(found, Exception):
        raise found
    return found


def _do_share(given: dict[str, Any]) -> FineTuned | Exception | None:
    """Runs in each worker; the first returns what all have found."""
    os.nice(NICE)
    context = get_context()
    job: Job = ray.get(given["job"])
    found: FineTuned | Exception
    with joined_team(
        context.get_world_rank(),
        context.get_world_size(),
        host=ray.util.get_node_ip_address(),  # type: ignore[no-untyped-call]  # Ray leaves it untyped
        backend=given["backend"],
        agree=broadcast_from_rank_zero,
    ) as team:
        try:
            found = job(team=team)
        except (TailraceError, ValueError) as error:  # everyone's, and the same if tried again
            found = error
        return found if team.leads else None
