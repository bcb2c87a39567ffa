"""Errors as HTTP answers: RFC 9457 problem details, always `application/problem+json`, naming the field at fault."""

import math
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

import msgspec
import structlog
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from tailrace.errors import BrokerUnavailable, InvalidRecord, NotReady, Overloaded, StoreError

log = structlog.get_logger()

MEDIA_TYPE = "application/problem+json"


class FieldError(msgspec.Struct, frozen=True):
    """What is wrong with one field; `field` is a JSON path such as `$.n`, or `query.n`, `path.item_id`."""

    field: str
    reason: str


class ProblemDetails(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """RFC 9457: what went wrong with this call. `type` is stable; `detail` is for people."""

    type: str
    title: str
    status: int
    detail: str
    instance: str
    errors: list[FieldError] = []


class Problem(Exception):
    """A call that cannot be answered as asked. `slug` becomes the problem's stable type."""

    def __init__(
        self,
        status: int,
        slug: str,
        detail: str,
        *,
        errors: list[FieldError] | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(detail)
        self.status = status
        self.slug = slug
        self.detail = detail
        self.errors = errors or []
        self.retry_after_s = retry_after_s


def problem_response(problem: Problem, instance: str, headers: Mapping[str, str] | None = None) -> Response:
    """Returns the problem as an HTTP response. Retry-After is in whole seconds, rounded up."""
    details = ProblemDetails(
        type=f"urn:tailrace:problem:{problem.slug}",
        title=HTTPStatus(problem.status).phrase,
        status=problem.status,
        detail=problem.detail,
        instance=instance,
        errors=problem.errors,
    )
    sent = dict(headers or {})
    if problem.retry_after_s is not None:
        sent["Retry-After"] = str(max(math.ceil(problem.retry_after_s), 1))
    return Response(msgspec.json.encode(details), problem.status, sent, MEDIA_TYPE)


def problem_of(error: Exception) -> Problem:
    """Returns the problem that tells a caller what an error means for them."""
    match error:
        case Problem():
            return error
        case InvalidRecord():
            return Problem(422, "invalid", str(error), errors=[FieldError(error.field, error.reason)])
        case RequestValidationError():
            found = [_field_error(row) for row in error.errors()]
            return Problem(422, "invalid", "; ".join(f"{row.field}: {row.reason}" for row in found), errors=found)
        case HTTPException():
            slug = HTTPStatus(error.status_code).phrase.lower().replace(" ", "-")
            return Problem(error.status_code, slug, str(error.detail))
        case ClientDisconnect():
            return Problem(400, "incomplete", "the connection ended before the body did")
        case Overloaded():
            return Problem(429, "overloaded", str(error), retry_after_s=error.retry_after_s)
        case NotReady():
            return Problem(503, "not-ready", str(error), retry_after_s=1.0)
        case BrokerUnavailable():
            return Problem(503, "broker-unavailable", str(error), retry_after_s=1.0)
        case StoreError():
            return Problem(503, "store-unavailable", str(error), retry_after_s=1.0)
    return Problem(500, "internal", f"{type(error).__name__}; the service's log has the particulars")


def install_problem_answers(app: FastAPI) -> None:
    """Makes every error of `app` a problem: ours, FastAPI's validation, unknown paths and methods, and bugs."""

    async def answer(request: Request, error: Exception) -> Response:
        problem = problem_of(error)
        if problem.status == 500:
            log.error("request failed", path=request.url.path, error=repr(error), exc_info=error)
        headers = dict(error.headers) if isinstance(error, HTTPException) and error.headers else {}
        return problem_response(problem, request.url.path, headers)

    expected = (Problem, InvalidRecord, RequestValidationError, HTTPException, ClientDisconnect)
    for kind in (*expected, Overloaded, NotReady, BrokerUnavailable, StoreError, Exception):
        app.add_exception_handler(kind, answer)


def _field_error(row: Mapping[str, Any]) -> FieldError:
    where, *path = (str(part) for part in row["loc"])
    return FieldError(".".join(["$" if where == "body" else where, *path]), str(row["msg"]))
