"""Gathers what the watchdog judges: impressions and clicks as they stream by, and what the replicas tell of versions.

Everything is bounded: impressions that wait for their clicks, clicks that came before their impression, and the
versions remembered. Users are counted in groups, by a hash of their id.

Versions that serve side by side are compared by what has been clicked so far: both lack the clicks that are yet to
come, and suffer alike from a machine under load. Versions that served one after the other are not: there each
impression is given the same time (`SETTLED_S`), or the newer one would always seem to lose, and those that the model
was too late for, whose order is not its own, are left out.
"""

import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b

import msgspec
import numpy as np

from tailrace.events import Action, Click, Impression
from tailrace.ids import ItemId, ModelVersion, RequestId, UserId
from training.judgement import GROUPS, Counts, Evidence

SETTLED_S = 60.0  # from being shown to a click that counts

_GRACE_S = 10.0  # for a click to reach us
_WAIT_S = 1800.0  # for clicks, where versions serve side by side
_MAX_WAITING = 20_000  # impressions, and as many early clicks; of more than come in the wait, the first stand for all
_MAX_OF_USER = 8  # impressions that a click without a request id may be of
_MAX_VERSIONS = 16
_ITS_OWN_ORDER = ("none", "no_profile")  # the rungs on which the model's scores rank
_GOOD: frozenset[Action] = frozenset({"click", "like", "save", "share", "purchase"})


class VersionCounts(msgspec.Struct, frozen=True, kw_only=True):
    """What a replica tells of one version, as far as the watchdog reads it: `services.bodies.VersionStats`."""

    requests: int
    below_top: int
    errors: int
    score_p50_ms: float | None


class ReplicaStatus(msgspec.Struct, frozen=True, kw_only=True):
    """What a replica tells of itself, as far as the watchdog reads it: `services.bodies.ModelStatus`."""

    replica: str
    refused: dict[ModelVersion, str]
    versions: dict[ModelVersion, VersionCounts]


class ModelsPage(msgspec.Struct, frozen=True, kw_only=True):
    """The answer of `/v1/models`, as far as the watchdog reads it."""

    replicas: list[ReplicaStatus]


_NOTHING = VersionCounts(requests=0, below_top=0, errors=0, score_p50_ms=None)


@dataclass
class _Clicks:
    impressions: int = 0
    shown_G: Counts = field(default_factory=lambda: np.zeros(GROUPS, np.int64))
    clicked_G: Counts = field(default_factory=lambda: np.zeros(GROUPS, np.int64))

    def add(self, group: int, shown: int, clicked: int = 0) -> None:
        self.impressions += 1
        self.shown_G[group] += shown
        self.clicked_G[group] += clicked


@dataclass
class _Version:
    requests: int = 0
    below_top: int = 0
    errors: int = 0
    score_p50_ms: float | None = None
    so_far: _Clicks = field(default_factory=_Clicks)
    settled: _Clicks = field(default_factory=_Clicks)
    refused: str = ""


@dataclass
class _Shown:
    """An impression that waits for clicks: its version, the user, and of each item whether it has been clicked.

    `at_ms` is when it was shown, `since_s` when we heard of it; `clicked_soon` counts clicks within `SETTLED_S`.
    """

    version: ModelVersion
    user_id: UserId
    group: int
    items: dict[ItemId, bool]
    at_ms: int
    since_s: float
    clicked_soon: int = 0


class LiveEvidence:
    """Counts by version since the last `begin`. One thread uses it."""

    def __init__(self, clock_s: Callable[[], float] = time.monotonic) -> None:
        self._clock_s = clock_s
        self._versions: OrderedDict[ModelVersion, _Version] = OrderedDict()
        self._waiting: OrderedDict[RequestId, _Shown] = OrderedDict()
        self._of_user: dict[UserId, deque[_Shown]] = {}  # those that wait, oldest first
        self._unsettled: deque[_Shown] = deque()  # oldest first
        self._early: OrderedDict[tuple[RequestId, ItemId], int] = OrderedDict()  # when they were
        self._told: dict[tuple[str, ModelVersion], VersionCounts] = {}

    def begin(self) -> None:
        """Forgets all counts; what replicas have counted so far belongs to the past."""
        self._versions.clear()
        self.break_off()

    def break_off(self) -> None:
        """Forgets impressions that wait: there is a gap in what is heard, and their clicks may have been in it."""
        self._waiting.clear()
        self._of_user.clear()
        self._unsettled.clear()
        self._early.clear()

    def so_far(self, version: ModelVersion) -> Evidence:
        """Returns the evidence on a version, for comparison with one that serves at the same time."""
        found = self._versions.get(version, _Version())
        return _evidence(found, found.so_far)

    def settled(self, version: ModelVersion) -> Evidence:
        """Returns the evidence on a version, for comparison with one that served at another time.

        Of impressions those shown a good while ago count, with the clicks that each had within `SETTLED_S`.
        """
        self._let_go()
        found = self._versions.get(version, _Version())
        return _evidence(found, found.settled)

    def add_impression(self, impression: Impression) -> None:
        """Counts what was shown. The same impression again changes nothing while the first still waits for clicks."""
        request_id = impression.request_id
        self._let_go()
        if request_id in self._waiting or len(self._waiting) >= _MAX_WAITING:
            return
        user_id = impression.user_id
        items = {ranked.item_id: False for ranked in impression.shown}
        shown = _Shown(
            impression.model_version, user_id, _group(user_id), items, at_ms=impression.at_ms, since_s=self._clock_s()
        )
        self._version(shown.version).so_far.add(shown.group, len(items))
        self._waiting[request_id] = shown
        self._of_user.setdefault(user_id, deque(maxlen=_MAX_OF_USER)).append(shown)
        if impression.degraded in _ITS_OWN_ORDER:
            self._unsettled.append(shown)
        for item_id in items:
            at_ms = self._early.pop((request_id, item_id), None)
            if at_ms is not None:
                self._count_click(shown, item_id, at_ms)

    def add_click(self, click: Click) -> None:
        """Counts a click for the impression it names: an item's first, and only what is a good sign.

        One that names none is of the user's latest impression of the item, as in a round.
        """
        if click.action not in _GOOD:
            return
        self._let_go()
        if click.request_id is None:
            recent = reversed(self._of_user.get(click.user_id, ()))
            shown = next((one for one in recent if click.item_id in one.items), None)
        else:
            shown = self._waiting.get(click.request_id)
        if shown is not None:
            self._count_click(shown, click.item_id, click.at_ms)
        elif click.request_id is not None:
            self._early[click.request_id, click.item_id] = click.at_ms
            if len(self._early) > _MAX_WAITING:
                self._early.popitem(last=False)

    def add_statuses(self, replicas: Sequence[ReplicaStatus]) -> None:
        """Adds what each replica has counted since it was last heard; the first call only begins to count.

        Counts that fell are those of a version loaded anew.
        """
        slow: dict[ModelVersion, list[tuple[int, float]]] = {}
        refused = {version: why for status in replicas for version, why in status.refused.items()}
        for status in replicas:
            for version, now in status.versions.items():
                before = self._told.get((status.replica, version), _NOTHING if self._told else now)
                if now.requests < before.requests:
                    before = _NOTHING
                found = self._version(version)
                found.requests += now.requests - before.requests
                found.below_top += now.below_top - before.below_top
                found.errors += now.errors - before.errors
                if now.score_p50_ms is not None:
                    slow.setdefault(version, []).append((now.requests, now.score_p50_ms))
        for version, told in slow.items():
            total = sum(requests for requests, _ in told)
            self._version(version).score_p50_ms = sum(requests * ms for requests, ms in told) / max(total, 1)
        for version, why in refused.items():
            self._version(version).refused = why
        for version in self._versions.keys() - refused.keys():
            self._versions[version].refused = ""
        self._told = {
            (status.replica, version): now for status in replicas for version, now in status.versions.items()
        } or self._told  # an answer without replicas says nothing

    def _count_click(self, shown: _Shown, item_id: ItemId, at_ms: int) -> None:
        if shown.items.get(item_id) is False:
            shown.items[item_id] = True
            shown.clicked_soon += at_ms - shown.at_ms <= SETTLED_S * 1000
            self._version(shown.version).so_far.clicked_G[shown.group] += 1

    def _let_go(self) -> None:
        """Settles what has waited long enough for that, and forgets what has waited long enough at all."""
        now_s = self._clock_s()
        while self._unsettled and self._unsettled[0].since_s <= now_s - SETTLED_S - _GRACE_S:
            shown = self._unsettled.popleft()
            self._version(shown.version).settled.add(shown.group, len(shown.items), shown.clicked_soon)
        while self._waiting and next(iter(self._waiting.values())).since_s <= now_s - _WAIT_S:
            shown = self._waiting.popitem(last=False)[1]
            of_user = self._of_user.get(shown.user_id)
            if of_user and of_user[0] is shown:  # it is not where the user has been shown more since than is kept
                of_user.popleft()
                if not of_user:
                    del self._of_user[shown.user_id]

    def _version(self, version: ModelVersion) -> _Version:
        if version not in self._versions and len(self._versions) >= _MAX_VERSIONS:
            self._versions.popitem(last=False)
        return self._versions.setdefault(version, _Version())


def _evidence(found: _Version, clicks: _Clicks) -> Evidence:
    return Evidence(
        requests=found.requests,
        below_top=found.below_top,
        errors=found.errors,
        score_p50_ms=found.score_p50_ms,
        impressions=clicks.impressions,
        shown_G=clicks.shown_G.copy(),
        clicked_G=clicks.clicked_G.copy(),
        refused=found.refused,
    )


def _group(user_id: UserId) -> int:
    return int.from_bytes(blake2b(user_id.encode(), digest_size=8).digest()) % GROUPS
