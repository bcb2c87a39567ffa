"""Says in OpenAPI what the routes take and give: the schemas come from the very classes that decode and encode."""

from typing import Any

import msgspec
from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from services.bodies import ModelStatus, RecommendationAnswer, RecommendationRequest
from services.event_intake import IntakeAnswer
from services.pages import ItemPage, ProfilePage, SimilarPage
from services.problem import MEDIA_TYPE, ProblemDetails
from tailrace.events import Click, Context, Rating
from tailrace.pointer import Pointer

_REF = "#/components/schemas/"
_EVENTS = {"click": Click, "rating": Rating, "context": Context}
_TYPES = (RecommendationRequest, RecommendationAnswer, IntakeAnswer, ProfilePage, ItemPage, SimilarPage)

# Route: what it is for, the class of a good answer by status, and which problems it may answer with.
_ROUTES: dict[tuple[str, str], tuple[str, dict[int, str | None], tuple[int, ...]]] = {
    ("post", "/v1/recommendations"): (
        "Recommend items to a user",
        {200: "RecommendationAnswer"},
        (400, 413, 422, 429),
    ),
    ("post", "/v1/events"): (
        "Post events; each gets its verdict. 200 all accepted, 207 some, 422 none usable, 503 none taken by the broker",
        {200: "IntakeAnswer", 207: "IntakeAnswer", 422: "IntakeAnswer", 503: "IntakeAnswer"},
        (400, 413, 422, 429, 503),
    ),
    ("get", "/v1/users/{user_id}/profile"): ("What is known of a user", {200: "ProfilePage"}, (404, 422, 503)),
    ("delete", "/v1/users/{user_id}/profile"): ("Forget a user", {202: "Deletion"}, (422, 503)),
    ("get", "/v1/items/{item_id}/similar"): ("Items close to this one", {200: "SimilarPage"}, (404, 422)),
    ("get", "/v1/items/{item_id}"): ("An item and what was done with it of late", {200: "ItemPage"}, (404,)),
    ("get", "/v1/models"): ("The champion, its history, and what each replica has loaded", {200: "Models"}, (503,)),
    ("get", "/healthz"): ("The process is up", {200: "Health"}, ()),
    ("get", "/readyz"): (
        "All that is needed is there; if not, the problem names what is missing",
        {200: "Health"},
        (503,),
    ),
    ("get", "/metrics"): ("Prometheus text", {200: None}, ()),
}
_BODIES: dict[tuple[str, str], dict[str, Any]] = {
    ("post", "/v1/recommendations"): {"$ref": f"{_REF}RecommendationRequest"},
    ("post", "/v1/events"): {
        "oneOf": [{"$ref": f"{_REF}PostedEvent"}, {"type": "array", "items": {"$ref": f"{_REF}PostedEvent"}}]
    },
}


def describe(api: FastAPI) -> None:
    """Makes `api` answer /openapi.json with the bodies, answers and problems of its routes."""

    def schema() -> dict[str, Any]:
        if api.openapi_schema is None:
            api.openapi_schema = _describe(get_openapi(title=api.title, version=api.version, routes=api.routes))
        return api.openapi_schema

    api.openapi = schema  # type: ignore[method-assign]  # FastAPI's documented way to replace it


def _describe(document: dict[str, Any]) -> dict[str, Any]:
    # FastAPI keeps `:path` out of the document only in part: the template is what callers see.
    document["paths"] = {path.replace(":path}", "}"): methods for path, methods in document["paths"].items()}
    for (method, path), (summary, answers, problems) in _ROUTES.items():
        operation = document["paths"][path][method]
        operation["summary"] = summary
        operation["responses"] = {str(status): _answer(name) for status, name in answers.items()}
        for status in problems:
            told = operation["responses"].setdefault(str(status), {"description": f"Problem {status}", "content": {}})
            told["content"] |= {MEDIA_TYPE: {"schema": {"$ref": f"{_REF}ProblemDetails"}}}
            if status in (429, 503):
                told["headers"] = {"Retry-After": {"schema": {"type": "integer"}, "description": "seconds"}}
        if (method, path) in _BODIES:
            content = {"application/json": {"schema": _BODIES[method, path]}}
            operation["requestBody"] = {"required": True, "content": content}
    document["components"] = {"schemas": _components()}
    return document


def _components() -> dict[str, Any]:
    types = (*_TYPES, ModelStatus, Pointer, ProblemDetails, *_EVENTS.values())
    _, components = msgspec.json.schema_components(types, ref_template=_REF + "{name}")
    posted = {}
    for kind, event in _EVENTS.items():
        own = components[event.__name__]
        optional = [name for name in own["required"] if name not in ("event_id", "occurred_at")]
        posted[f"Posted{event.__name__}"] = own | {
            "title": f"Posted{event.__name__}",
            "properties": {"type": {"const": kind}} | own["properties"],
            "required": ["type", *optional],
        }
    choice = {"oneOf": [{"$ref": _REF + name} for name in posted]}
    models = {
        "type": "object",
        "properties": {
            "pointer": {"anyOf": [{"$ref": f"{_REF}Pointer"}, {"type": "null"}]},
            "replicas": {"type": "array", "items": {"$ref": f"{_REF}ModelStatus"}},
        },
        "required": ["pointer", "replicas"],
    }
    small = {"Models": models, "Health": _strings("status"), "Deletion": _strings("status", "user_id")}
    return {**components, **posted, "PostedEvent": choice, **small}


def _strings(*names: str) -> dict[str, Any]:
    return {"type": "object", "properties": {name: {"type": "string"} for name in names}, "required": list(names)}


def _answer(name: str | None) -> dict[str, Any]:
    if name is None:
        return {"description": "Text", "content": {"text/plain": {"schema": {"type": "string"}}}}
    return {"description": name, "content": {"application/json": {"schema": {"$ref": _REF + name}}}}
