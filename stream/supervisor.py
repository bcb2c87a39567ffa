"""The supervisor: as many stream workers as the lag asks for, each replaced when it has work and makes no progress.

Workers are detached Ray actors: they go on while no supervisor runs, and the next supervisor finds them.
"""

import threading
import time
from collections.abc import Mapping
from typing import Any

import structlog
from ray.exceptions import RayError

from stream.fleet import Fleet
from stream.plan import Assignment, StallWatch, plan_workers
from stream.supervisor_metrics import metrics_endpoint
from tailrace.errors import BrokerUnavailable
from tailrace.kafka_clients import create_topics, open_admin, stream_lag
from tailrace.settings import Settings

log = structlog.get_logger()

TICK_S = 1.0
_QUIET_BEFORE_FEWER_S = 30.0


def supervise(settings: Settings, *, stop: threading.Event, leave_running: bool = False) -> None:
    """Keeps the stream workers running until `stop` is set; then stops them gracefully, or leaves them.

    Ray is the caller's to start, and to stop. Raises TopicMismatch when the topics are not as the settings say.
    """
    fleet = Fleet(settings)
    lag_reader = LagReader(settings)
    watch = StallWatch(settings.stream.stall_s)
    quiet = QuietTime(_QUIET_BEFORE_FEWER_S)
    with metrics_endpoint(fleet, settings.stream.metrics_port) as metrics:
        fleet.adopt()
        while not stop.is_set():
            try:
                # 1. How much is there to do, and how far has everyone come?
                lag = lag_reader.read()
                fleet.ask()
                metrics.lag = lag or {}
                # 2. Fewer or more workers, or partitions nobody owns.
                if lag is not None:
                    plan = plan_workers(lag, fleet.assignment, settings.stream)
                    if quiet.allows(plan, fleet.assignment, time.monotonic()):
                        _carry_out(plan, fleet, watch)
                # 3. Who has work and makes no progress? While the broker is away, nobody can.
                for number, member in list(fleet.members.items()):
                    to_do, reached = member.work(dict.fromkeys(member.partitions, 0) if lag is None else lag)
                    if watch.has_stalled(number, to_do, reached, time.monotonic()):
                        log.error("worker stalled; replaced", worker=number, lag=to_do, answers=member.answered)
                        watch.forget([number])
                        fleet.replace(number)
            except (RayError, ValueError) as error:
                log.error("supervisor could not do its round", error=str(error))
            stop.wait(TICK_S)
        if not leave_running:
            fleet.stop(list(fleet.members))
    lag_reader.close()


def _carry_out(plan: Assignment, fleet: Fleet, watch: StallWatch) -> None:
    """Stops every worker whose partitions change, all of them before any starts: fencing is for accidents."""
    changed = [number for number, partitions in fleet.assignment.items() if plan.get(number) != partitions]
    fleet.stop(changed)
    watch.forget(changed)
    for number, partitions in plan.items():
        if number not in fleet.members:
            fleet.start(number, partitions)


class QuietTime:
    """Lets workers be taken away only after it has been quiet for a while; everything else at once."""

    def __init__(self, quiet_s: float) -> None:
        self._quiet_s = quiet_s
        self._since_s: float | None = None

    def allows(self, plan: Assignment, current: Assignment, now_s: float) -> bool:
        """Returns whether the plan is to be carried out now."""
        if len(plan) >= len(current):
            self._since_s = None
            return plan != current
        if self._since_s is None:
            self._since_s = now_s
        return now_s - self._since_s >= self._quiet_s


class LagReader:
    """Reads the lag of every partition from Kafka, over one connection that is made anew when it fails."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._admin: Any = None

    def read(self) -> Mapping[int, int] | None:
        """Returns records of lag by partition, or None while the broker is away."""
        kafka = self._settings.kafka
        try:
            if self._admin is None:
                create_topics(kafka)
                self._admin = open_admin(kafka)
            by_stream = stream_lag(self._admin, kafka, self._settings.stream.group)
        except BrokerUnavailable as error:
            log.warning("supervisor waits for the broker", error=str(error))
            self.close()
            return None
        lag = dict.fromkeys(range(kafka.user_partitions), 0)
        for (_, partition), records in by_stream.items():
            lag[partition] += records
        return lag

    def close(self) -> None:
        """Closes the connection."""
        if self._admin is not None:
            self._admin.close()
            self._admin = None
