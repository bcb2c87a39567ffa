"""An answer always comes: what the gateway does when parts of the service are late or gone.

| rung       | when                                         | what the answer is made of                               |
|------------|----------------------------------------------|----------------------------------------------------------|
| none       | all is well                                  | BERT, fresh features, slate                              |
| no_profile | the store fails or is late                   | the same, as for a new user                              |
| no_text    | the text model is late or fails (in ranker)  | the prior over cosines and counters, slate               |
| popular    | no ranker answers in time, or all are full   | the gateway's own counters: popular of late, new first   |

The lowest rung taken is the one the answer and its impression name. Filters and exclusions hold on every rung; what
the user has seen holds wherever the profile could be read.
"""

import asyncio
import time
from collections.abc import Callable
from typing import Protocol

import msgspec
import structlog

from services.bodies import Asked, RankedAnswer, RecommendationAnswer, RecommendationRequest
from services.event_log import Delivery, EventLog, Outgoing
from services.metrics import GatewayMetrics
from services.popular import POPULAR, rank_popular
from services.profiles import ProfileReader
from services.situation import profile_age_ms
from tailrace.catalogue import Catalogue
from tailrace.errors import BrokerUnavailable, NotReady, Overloaded, StoreError, TooLate
from tailrace.ids import RequestId
from tailrace.profile import Profile, decode_profile
from tailrace.settings import RankerSettings

log = structlog.get_logger()

_PROFILE_SHARE = 0.25  # of the deadline, for reading the profile
_RANKER_FAILURES = (TooLate, Overloaded, NotReady)
_TROUBLES_TO_REST = 5
_REST_S = 1.0


class Ranking(Protocol):
    """The way to a ranker replica."""

    async def rank(self, asked: bytes, timeout_s: float) -> bytes:
        """Returns the encoded RankedAnswer. Raises TooLate, Overloaded or NotReady."""


_asked_encoder = msgspec.msgpack.Encoder()
_ranked_decoder = msgspec.msgpack.Decoder(RankedAnswer)


class Ladder:
    """Answers recommendation requests from the best rung that holds."""

    def __init__(
        self,
        *,
        ranker: Ranking,
        profiles: ProfileReader,
        catalogue: Catalogue,
        event_log: EventLog,
        metrics: GatewayMetrics,
        settings: RankerSettings,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._ranker = ranker
        self._profiles = profiles
        self._catalogue = catalogue
        self._event_log = event_log
        self._metrics = metrics
        self._settings = settings
        self._clock = clock
        self._troubles = 0
        self._rest_until = 0.0

    async def answer(
        self, request: RecommendationRequest, *, request_id: RequestId, received: float, now_ms: int
    ) -> RecommendationAnswer:
        """Returns the answer. The deadline counts from `received`, monotonic seconds."""
        deadline = received + self._settings.deadline_s
        # 1. The user's profile, lock-free from the store.
        stored, profile, known = await self._load_profile(request, self._left(deadline) * _PROFILE_SHARE)
        asked = Asked(
            request_id=request_id,
            request=request,
            profile=stored,
            now_ms=now_ms,
            budget_s=0.0,
            profile_missing=not known,
        )
        # 2. The slate: from a ranker replica in what time is left, or from here.
        ranked = await self._rank(asked, deadline)
        # 3. What was shown goes to the log; nobody waits for it.
        if not request.dry_run:
            self._log_impression(request, ranked.impression)
        # 4. The answer.
        self._note(ranked)
        took_ms = round((self._clock() - received) * 1000, 2)
        return RecommendationAnswer(
            request_id=request_id,
            model_version=ranked.model_version,
            profile_age_ms=profile_age_ms(profile, now_ms),
            profile_events=profile.events,
            degraded=ranked.degraded,
            took_ms=took_ms,
            items=ranked.items,
            timings=ranked.timings if request.explain else None,
        )

    async def _load_profile(
        self, request: RecommendationRequest, timeout_s: float
    ) -> tuple[bytes | None, Profile, bool]:
        try:
            stored = await self._profiles.load(request.user_id, timeout_s)
            return stored, Profile(request.user_id) if stored is None else decode_profile(stored), True
        except (StoreError, msgspec.MsgspecError) as error:
            log.warning("profile left out", error=str(error))
            return None, Profile(request.user_id), False

    async def _rank(self, asked: Asked, deadline: float) -> RankedAnswer:
        left_s = self._left(deadline)
        # After several failures in a row the ranker is left alone for a moment: waiting for it would only pile up.
        if left_s > 0 and self._clock() >= self._rest_until:
            try:
                sent = _asked_encoder.encode(msgspec.structs.replace(asked, budget_s=left_s))
                ranked = _ranked_decoder.decode(await self._ranker.rank(sent, left_s))
                self._troubles = 0
                return ranked
            except _RANKER_FAILURES as error:
                self._troubles += 1
                if self._troubles >= _TROUBLES_TO_REST:
                    self._rest_until = self._clock() + _REST_S
                log.warning("no ranker answered", reason=str(error), in_a_row=self._troubles)
        # Linear in the catalogue, so not on the event loop.
        items, impression = await asyncio.to_thread(rank_popular, asked, self._catalogue)
        return RankedAnswer(model_version=POPULAR, degraded="popular", items=items, impression=impression, timings={})

    def _log_impression(self, request: RecommendationRequest, impression: bytes) -> None:
        produced, dropped = self._metrics.impressions.labels("produced"), self._metrics.impressions.labels("dropped")
        try:
            delivery = self._event_log.append([Outgoing("impressions", request.user_id, impression)])
        except BrokerUnavailable:
            dropped.inc()
            return

        def note(_: object, delivery: Delivery = delivery) -> None:
            (produced if delivery.outcomes[0] is True else dropped).inc()

        delivery.finished.add_done_callback(note)

    def _note(self, ranked: RankedAnswer) -> None:
        metrics = self._metrics
        metrics.answers.labels(ranked.degraded).inc()
        metrics.note_model(ranked.model_version, ranked.degraded, ranked.timings.get("score"))
        metrics.ranker_waiting.set(ranked.waiting)
        for stage, took_ms in ranked.timings.items():
            metrics.stages.labels(stage).observe(took_ms / 1000)

    def _left(self, deadline: float) -> float:
        return max(deadline - self._clock(), 0.0)
