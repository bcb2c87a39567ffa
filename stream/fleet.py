"""The worker actors as the supervisor sees them: find, start, ask, stop. Knows Ray; decides nothing."""

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
import structlog
from ray.exceptions import GetTimeoutError, RayError

from stream.plan import Assignment
from stream.progress import Progress
from stream.worker_actor import NAMESPACE, PREFIX, fingerprint, start_actor
from tailrace.settings import Settings

log = structlog.get_logger()

_ANSWER_TIMEOUT_S = 2.0
_STOP_TIMEOUT_S = 20.0
_NAME_TIMEOUT_S = 30.0


@dataclass
class Member:
    """One worker actor, and the newest it has said of itself; `restarts` counts its processes but the first."""

    partitions: tuple[int, ...]
    handle: Any
    progress: Progress | None = None
    answered: bool = False
    pid: int | None = None

    def work(self, lag: Mapping[int, int]) -> tuple[int, object]:
        """Returns how many records it has yet to fold, and how far it has come: None where it does not answer.

        Where partitions of its have been claimed by another, it is those that count: it never goes on with them.
        """
        lost = () if self.progress is None else self.progress.fenced
        to_do = sum(lag[partition] for partition in lost or self.partitions)
        if not self.answered or self.progress is None:
            return to_do, None
        return to_do, lost or self.progress.next_offsets


class Fleet:
    """The worker actors of one deployment, by number."""

    def __init__(self, settings: Settings) -> None:
        self.members: dict[int, Member] = {}
        self.restarts: dict[int, int] = {}
        self._settings = settings

    @property
    def assignment(self) -> Assignment:
        """Who owns what."""
        return {number: member.partitions for number, member in self.members.items()}

    def adopt(self) -> None:
        """Takes over the workers that an earlier supervisor left running with these very settings; ends others."""
        ours = fingerprint(self._settings)
        taken: set[int] = set()
        for row in ray.util.list_named_actors(all_namespaces=True):
            name = row["name"]
            if row["namespace"] != NAMESPACE or not name.startswith(PREFIX):
                continue
            try:
                handle = ray.get_actor(name, namespace=NAMESPACE)
            except ValueError:
                continue  # it has just ended
            number = int(name.removeprefix(PREFIX))
            theirs, partitions = _ask(handle.describe, ("", ()))
            if theirs == ours and taken.isdisjoint(partitions):
                self.members[number] = Member(partitions, handle)
                taken.update(partitions)
                log.info("worker adopted", worker=number, partitions=partitions)
            else:
                _end(handle, gracefully=True)
                log.info("worker of other settings ended", worker=number)

    def start(self, number: int, partitions: Sequence[int]) -> None:
        """Starts a worker. Raises RayError, or ValueError when its name stays taken."""
        deadline = time.monotonic() + _NAME_TIMEOUT_S
        while True:
            try:
                handle = start_actor(number, self._settings, partitions)
                break
            except ValueError:  # Ray frees the name of an actor a moment after its end
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.1)
        self.members[number] = Member(tuple(partitions), handle)
        log.info("worker started", worker=number, partitions=tuple(partitions))

    def stop(self, numbers: Iterable[int], *, gracefully: bool = True) -> None:
        """Ends workers: all finish their batch at the same time, unless they are killed."""
        ending = [(number, self.members.pop(number)) for number in list(numbers)]
        asked = [member.handle.stop.remote() for _, member in ending] if gracefully else []
        if asked:
            ray.wait(asked, num_returns=len(asked), timeout=_STOP_TIMEOUT_S)
        for number, member in ending:
            _end(member.handle, gracefully=False)
            log.info("worker ended", worker=number, gracefully=gracefully)

    def replace(self, number: int) -> None:
        """Kills a worker and starts it again on the same partitions."""
        partitions = self.members[number].partitions
        self.stop([number], gracefully=False)
        self.restarts[number] = self.restarts.get(number, 0) + 1
        self.start(number, partitions)

    def ask(self) -> None:
        """Asks every worker for its progress; one that does not answer in time keeps its last."""
        asked = {member.handle.progress.remote(): number for number, member in self.members.items()}
        ready, _ = ray.wait(list(asked), num_returns=len(asked), timeout=_ANSWER_TIMEOUT_S) if asked else ([], [])
        for member in self.members.values():
            member.answered = False
        for reference in ready:
            number = asked[reference]
            member = self.members[number]
            try:
                member.progress = ray.get(reference)
            except RayError as error:
                log.warning("worker does not answer", worker=number, error=str(error).splitlines()[0])
                continue
            member.answered = True
            assert member.progress is not None
            if member.pid not in (None, member.progress.pid):
                self.restarts[number] = self.restarts.get(number, 0) + 1
                log.warning("worker was started again by Ray", worker=number, restarts=self.restarts[number])
            member.pid = member.progress.pid


def _ask(method: Any, otherwise: Any) -> Any:
    try:
        return ray.get(method.remote(), timeout=_ANSWER_TIMEOUT_S)
    except (GetTimeoutError, RayError):
        return otherwise


def _end(handle: Any, *, gracefully: bool) -> None:
    if gracefully:
        _ask(handle.stop, None)
    ray.kill(handle, no_restart=True)
