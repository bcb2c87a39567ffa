"""The HTTP API: routes, and nothing but routes. What an answer is made of is in `ladder.py` and `event_intake.py`."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec
from fastapi import FastAPI, Query, Request, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from services.admission import Admission
from services.bodies import decode_body, recommendation_decoder
from services.event_intake import decode_posted, take_events
from services.event_log import EventLog, Outgoing
from services.ladder import Ladder
from services.metrics import GatewayMetrics
from services.openapi import describe
from services.pages import SimilarPage, item_page, profile_page, similar_by_topics
from services.problem import Problem, install_problem_answers
from services.profiles import ProfileReader
from services.ranker_client import RankerClient
from services.readiness import check_readiness
from tailrace.catalogue import Catalogue
from tailrace.errors import BundleError, InvalidRecord, NotReady, Overloaded, TooLate
from tailrace.ids import ItemId, RequestId, UserId
from tailrace.profile import decode_profile
from tailrace.registry import Registry
from tailrace.settings import Settings
from tailrace.table_reader import TableReader
from tailrace.topics import USER_STREAMS

_ASIDE_TIMEOUT_S = 2.0  # for everything that is not a recommendation


@dataclass(frozen=True)
class GatewayParts:
    """What the API is made of. Chosen in `app.py` for a process, in tests for a test."""

    settings: Settings
    ranker: RankerClient
    profiles: ProfileReader
    event_log: EventLog
    catalogue: Catalogue
    tables: list[TableReader]
    registry: Registry
    metrics: GatewayMetrics
    new_id: Callable[[], str]
    now_ms: Callable[[], int]


def build_api(parts: GatewayParts) -> FastAPI:
    """Returns the API over these parts."""
    settings = parts.settings.gateway
    api = FastAPI(title="Tailrace", version="1", docs_url="/docs", redoc_url=None)
    admission = Admission(settings.max_ongoing_requests, settings.max_queued_requests)
    ladder = Ladder(
        ranker=parts.ranker,
        profiles=parts.profiles,
        catalogue=parts.catalogue,
        event_log=parts.event_log,
        metrics=parts.metrics,
        settings=parts.settings.ranker,
    )
    install_problem_answers(api)
    api.add_middleware(Measured, metrics=parts.metrics, admission=admission)

    @api.post("/v1/recommendations")
    async def recommend(request: Request) -> Response:
        received = time.monotonic()
        asked = decode_body(recommendation_decoder, await read_body(request, settings.max_body_bytes))
        async with admission.place():
            answer = await ladder.answer(
                asked, request_id=RequestId(parts.new_id()), received=received, now_ms=parts.now_ms()
            )
        return json_response(answer)

    @api.post("/v1/events")
    async def post_events(request: Request) -> Response:
        body = await read_body(request, settings.max_body_bytes)
        posted = decode_posted(body, settings.max_events_per_call)
        async with admission.place():
            answer = await take_events(
                posted,
                parts.event_log,
                now_ms=parts.now_ms(),
                max_ahead_s=parts.settings.stream.max_ahead_s,
                ack_timeout_s=settings.ack_timeout_s,
                new_id=parts.new_id,
            )
        for verdict in answer.verdicts:
            parts.metrics.events.labels(verdict.status).inc()
        headers = {"Retry-After": "1"} if answer.retry else {}
        return json_response(answer, answer.http_status, headers)

    @api.get("/v1/users/{user_id:path}/profile")
    async def get_profile(user_id: str) -> Response:
        stored = await parts.profiles.load(_require_user_id(user_id), _ASIDE_TIMEOUT_S)
        profile = None if stored is None else decode_profile(stored)
        if profile is None or profile.events == 0:
            raise Problem(404, "unknown-user", f"nothing is known of user {user_id!r}")
        return json_response(profile_page(profile, parts.now_ms()))

    @api.delete("/v1/users/{user_id:path}/profile")
    async def delete_profile(user_id: str) -> Response:
        key = _require_user_id(user_id)
        # One erasure in each stream, all of the same moment: see `fold.fold_erasure`.
        at_ms = parts.now_ms()
        delivery = parts.event_log.append([Outgoing(stream, key, None, at_ms) for stream in USER_STREAMS])
        await asyncio.wait([asyncio.wrap_future(delivery.finished)], timeout=settings.ack_timeout_s)
        delivery.abandon()
        if any(outcome is not True for outcome in delivery.outcomes):
            raise Problem(503, "broker-unavailable", "the broker did not confirm the deletion", retry_after_s=1.0)
        return json_response({"status": "accepted", "user_id": user_id}, 202)

    @api.get("/v1/items/{item_id:path}/similar")
    async def get_similar(item_id: str, n: Annotated[int, Query(ge=1, le=100)] = 10) -> Response:
        if parts.catalogue.item(ItemId(item_id)) is None:
            raise Problem(404, "unknown-item", f"there is no item {item_id!r}")
        try:
            items, degraded = await parts.ranker.similar(ItemId(item_id), n, _ASIDE_TIMEOUT_S), "none"
        except (NotReady, Overloaded, TooLate):
            items, degraded = await asyncio.to_thread(similar_by_topics, parts.catalogue, ItemId(item_id), n), "no_text"
        return json_response(SimilarPage(item_id=ItemId(item_id), degraded=degraded, items=items))

    @api.get("/v1/items/{item_id:path}")
    async def get_item(item_id: str) -> Response:
        page = item_page(parts.catalogue, ItemId(item_id), parts.now_ms())
        if page is None:
            raise Problem(404, "unknown-item", f"there is no item {item_id!r}")
        return json_response(page)

    @api.get("/v1/models")
    async def get_models() -> Response:
        try:
            pointer = await asyncio.wait_for(asyncio.to_thread(parts.registry.pointer), _ASIDE_TIMEOUT_S)
        except (BundleError, OSError) as error:  # a TimeoutError is an OSError
            why = str(error) or f"the registry did not answer within {_ASIDE_TIMEOUT_S:g} s"
            raise Problem(503, "registry-unavailable", why, retry_after_s=5.0) from error
        try:
            replicas = await parts.ranker.statuses(_ASIDE_TIMEOUT_S)
        except (NotReady, Overloaded, TooLate):
            replicas = []
        return json_response({"pointer": pointer, "replicas": replicas})

    @api.get("/healthz")
    async def healthz() -> Response:
        return json_response({"status": "up"})

    @api.get("/readyz")
    async def readyz() -> Response:
        missing = await check_readiness(parts)
        if missing:
            named = ", ".join(row.field for row in missing)
            raise Problem(503, "not-ready", f"not ready: {named}", errors=missing, retry_after_s=1.0)
        return json_response({"status": "ready"})

    @api.get("/metrics")
    async def metrics() -> Response:
        return Response(parts.metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")

    describe(api)
    return api


async def read_body(request: Request, max_bytes: int) -> bytes:
    """Returns the whole body. Raises Problem 413 as soon as it is known to be too large."""
    too_large = Problem(413, "too-large", f"the body is larger than {max_bytes} bytes")
    stated = request.headers.get("content-length", "")
    if stated.isdecimal() and int(stated) > max_bytes:
        raise too_large
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > max_bytes:
            raise too_large
    return bytes(body)


def _require_user_id(user_id: str) -> UserId:
    if not 1 <= len(user_id) <= 256:
        raise InvalidRecord("must have 1 to 256 characters", field="path.user_id")
    return UserId(user_id)


def json_response(body: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """Returns the body as JSON."""
    return Response(msgspec.json.encode(body), status, headers, "application/json")


class Measured:
    """Counts and times every request by its route's template; raw paths carry ids and would grow without bound."""

    def __init__(self, app: ASGIApp, metrics: GatewayMetrics, admission: Admission) -> None:
        self._app = app
        self._metrics = metrics
        self._admission = admission

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes the request on and notes what came of it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status = time.monotonic(), 500

        async def note_status(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, note_status)
        finally:
            route = getattr(scope.get("route"), "path", "unknown")
            self._metrics.requests.labels(route, str(status)).inc()
            self._metrics.latency.labels(route).observe(time.monotonic() - started)
            self._metrics.running.set(self._admission.running)
            self._metrics.waiting.set(self._admission.waiting)
