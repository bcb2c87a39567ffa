"""Training as a Ray job beside the services: rounds by schedule, in a process of their own, and the watchdog.

The actor's name is taken while a job runs, so two jobs of one cluster cannot overlap; the round's own lock and the
generation of the registry's pointer keep apart what Ray does not know of.
"""

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import ray
import structlog
from ray.exceptions import RayActorError, RayTaskError

from deploy.ray_cluster import NAMESPACE, NICE
from tailrace.errors import NothingToLearn, Pinned, RoundRunning, TailraceError
from tailrace.registry import open_registry
from tailrace.rounds import RoundRecord
from tailrace.settings import Settings
from tailrace.status import load_spans
from tailrace.telemetry import configure_logging
from training.schedule import Schedule
from training.watchdog import watchdog_beside

log = structlog.get_logger()

ACTOR = "tailrace-training"
_TICK_S = 1.0
_TELL_EVERY_S = 0.5

Step = tuple[str, int, int]  # what is under way, done, in all
Ended = Callable[[RoundRecord], None]


class TrainingActor:
    """Runs rounds, one at a time; says beside it how far the present one has come."""

    def __init__(self, settings: Settings) -> None:
        os.nice(NICE)
        configure_logging(settings)
        self._settings = settings
        self._step: Step = ("waiting", 0, 0)

    def run_round(self) -> RoundRecord | str:
        """Returns what became of a round, or why there was none."""
        from deploy.training_parts import round_parts  # torch takes seconds, and only rounds need it
        from training.round import run_round

        try:
            return run_round(round_parts(self._settings, _Teller(ray.get_runtime_context().current_actor)))
        except (NothingToLearn, Pinned, RoundRunning) as error:
            return str(error)
        finally:
            self._step = ("waiting", 0, 0)

    def step(self) -> Step:
        """Returns what is under way."""
        return self._step

    def note(self, step: Step) -> None:
        """Keeps what is under way, which a round says from whichever process does it."""
        self._step = step


class _Teller:
    """Tells the actor how far a round has come, from any process it is sent to; now and then, not to flood it."""

    def __init__(self, actor: Any) -> None:
        self._actor, self._what, self._told_at = actor, "", 0.0

    def __call__(self, what: str, done: int, total: int) -> None:
        now = time.monotonic()
        if what != self._what or now - self._told_at > _TELL_EVERY_S:
            self._what, self._told_at = what, now
            self._actor.note.remote((what, done, total))


@contextmanager
def training_actor(settings: Settings) -> Iterator[Any]:
    """Gives the actor, which ends with the block. Raises RoundRunning where this cluster has one already."""
    options = ray.remote(TrainingActor).options(
        name=ACTOR,
        namespace=NAMESPACE,
        num_cpus=settings.training.num_cpus,
        max_concurrency=2,
        max_restarts=-1,
    )
    try:
        actor: Any = options.remote(settings)
    except ValueError as error:
        raise RoundRunning("a training job runs on this Ray cluster already") from error
    try:
        yield actor
    finally:
        ray.kill(actor, no_restart=True)


def train_once(settings: Settings, show: Callable[[Step], None] = lambda step: None) -> RoundRecord:
    """Returns what became of one round. Raises NothingToLearn where there is too little feedback, or its failure."""
    with training_actor(settings) as actor:
        found = _await_round(actor, show, threading.Event())
    if not isinstance(found, RoundRecord):
        raise NothingToLearn(found or "the round was stopped")
    return found


def train_by_schedule(
    settings: Settings,
    schedule: Schedule,
    *,
    stop: threading.Event,
    ended: Ended = lambda record: None,
    show: Callable[[Step], None] = lambda step: None,
) -> None:
    """Runs a round whenever one is due, and the watchdog all the while, until `stop` is set.

    A round that fails, whatever of, is logged and recorded; the next is due as if it had run. Raises RoundRunning
    where this cluster has a training job already.
    """
    registry = open_registry(settings)
    with training_actor(settings) as actor, watchdog_beside(settings):
        began, seen = time.monotonic(), 0
        while not stop.wait(_TICK_S):
            try:
                logged = count_impressions(settings)
                pointer = registry.pointer()
                canary_runs = pointer is not None and pointer.canary is not None
                if not schedule.is_due(time.monotonic() - began, logged - seen, canary_runs=canary_runs):
                    continue
                began, seen = time.monotonic(), logged  # whatever comes of it: not the same feedback again and again
                found = _await_round(actor, show, stop)
                if isinstance(found, RoundRecord):
                    ended(found)
                else:
                    log.info("no round", reason=found)
            except Exception as error:  # the next round may do better, and the watchdog must go on
                log.error("round failed; what serves is as it was", error=(str(error) or repr(error)).splitlines()[0])


def count_impressions(settings: Settings) -> int:
    """Returns how many records `impressions` has ever had. Raises BrokerUnavailable."""
    spans = load_spans(settings.kafka)
    return sum(end for (role, _), (_, end) in spans.items() if role == "impressions")


def _await_round(actor: Any, show: Callable[[Step], None], stop: threading.Event) -> RoundRecord | str:
    running = actor.run_round.remote()
    while not stop.is_set():
        ready, _ = ray.wait([running], timeout=0.5)
        if ready:
            try:
                found: RoundRecord | str = ray.get(running)
            except RayTaskError as error:
                cause: Any = error.cause
                raise cause if isinstance(cause, TailraceError) else TailraceError(repr(cause)) from error
            return found
        try:
            show(ray.get(actor.step.remote(), timeout=1.0))
        except (RayActorError, ray.exceptions.GetTimeoutError):
            continue  # the round itself says what is wrong
    return ""
