"""What a training round is given: the one place that wires it. Training itself imports neither services nor Ray."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import structlog

from services.parts import Parts
from services.scorer import Scorer
from tailrace.errors import BrokerUnavailable
from tailrace.events import ModelAnnouncement
from tailrace.registry import announce, open_registry
from tailrace.rounds import open_round_log
from tailrace.settings import Settings
from training.fine_tune import FineTuned, Job, learn_alone
from training.log_window import AlreadyRead, LogWindow, Window, plan_window, read_examples
from training.rescoring import BundleScorer
from training.round import Progress, RoundParts
from training.trackers import require_trackers

log = structlog.get_logger()


class KafkaLog:
    """Impressions and feedback on Kafka, as `training.round.FeedbackLog`."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    def plan(self, *, now_ms: int, already: AlreadyRead | None) -> LogWindow:
        """Returns the window that ends now. Raises BrokerUnavailable."""
        return plan_window(self._settings.kafka, self._settings.training, now_ms=now_ms, already=already)

    def read(self, window: LogWindow, progress: Progress) -> Window:
        """Returns the window's examples. Raises BrokerUnavailable."""
        training = self._settings.training
        return read_examples(self._settings.kafka, window, training, seed=training.seed, progress=progress)


def open_scorer(settings: Settings) -> Callable[[Path], BundleScorer]:
    """Returns what opens a bundle as serving would: at the precision, on the device, with the threads that serve.

    What two bundles have in common is opened once.
    """
    ranker, parts = settings.ranker, Parts()

    def open_bundle(folder: Path) -> BundleScorer:
        return Scorer.load(
            folder,
            parts,
            precision=ranker.served_precision,
            provider=ranker.device,
            intra_op_threads=ranker.intra_op_threads,
        )

    return open_bundle


def round_parts(settings: Settings, progress: Progress) -> RoundParts:
    """Returns the parts of a round on Kafka. Nothing is connected yet.

    With several workers `progress` is called in another process than this. Raises SettingsError where the package of a
    tracker is missing: a round is not begun to find that out at its end.
    """
    require_trackers(settings.training)

    def tell_replicas(announcement: ModelAnnouncement) -> None:
        try:
            announce(settings.kafka, announcement)
        except BrokerUnavailable as error:
            # The pointer has moved, and the round has not failed: replicas find out by themselves, only later.
            log.warning("replicas could not be told that the pointer has moved", error=str(error))

    return RoundParts(
        settings=settings,
        registry=open_registry(settings),
        rounds=open_round_log(settings),
        log=KafkaLog(settings),
        open_scorer=open_scorer(settings),
        announce=tell_replicas,
        learn=choose_learning(settings),
        progress=progress,
    )


def choose_learning(settings: Settings) -> Callable[[Job], FineTuned]:
    """Returns how a round learns: in its own process, or as one of several workers through Ray Train."""
    if settings.training.workers == 1:
        return learn_alone
    from deploy.learning_team import learn_together  # imports Ray Train, which takes seconds

    return partial(learn_together, settings=settings.training, folder=settings.path("cache") / "ray-train")
