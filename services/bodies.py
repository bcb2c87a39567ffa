"""What goes over HTTP: the bodies of the API, decoded strictly. An unknown field is an error that names it."""

from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta

from services.filters import Filters
from services.problem import Problem
from tailrace.errors import InvalidRecord
from tailrace.events import ShortScalar, ShortText, invalid_record
from tailrace.ids import ItemId, ItemIdField, ModelVersion, RequestId, UserIdField

Degraded = Literal["none", "no_text", "no_profile", "popular"]


class RequestContext(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """Where and with what the user asks, now. A field given here overrides the user's last known context."""

    device: ShortText | None = None
    platform: ShortText | None = None
    locale: ShortText | None = None
    country: ShortText | None = None
    region: ShortText | None = None
    place: ShortText | None = None
    session_id: ShortText | None = None
    attributes: Annotated[dict[ShortText, ShortScalar], Meta(max_length=32)] = {}


class RecommendationRequest(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """What an app asks for."""

    user_id: UserIdField
    n: Annotated[int, Meta(ge=1, le=100, description="how many items")] = 10
    context: RequestContext | None = None
    query: Annotated[
        Annotated[str, Meta(max_length=1000)] | None, Meta(description="what the user is looking for, in words")
    ] = None
    candidates: Annotated[
        Annotated[list[ItemIdField], Meta(min_length=1, max_length=1000)] | None,
        Meta(description="rank these instead of the catalogue; those unknown, seen, hidden or filtered are left out"),
    ] = None
    filters: Filters = Filters()
    exclude: Annotated[list[ItemIdField], Meta(max_length=2000, description="never these items")] = []
    explain: Annotated[bool, Meta(description="add reasons and timings")] = False
    dry_run: Annotated[bool, Meta(description="log no impression; use for tests and previews")] = False
    include_seen: Annotated[
        bool, Meta(description="also items the user has already touched, though never those they have hidden")
    ] = False


class RecommendedItem(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One item of an answer. `source` is where the candidate came from."""

    item_id: ItemId
    title: str
    position: int
    score: float
    source: str
    explored: bool
    reasons: list[str] | None = None


class RecommendationAnswer(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """An answer. `degraded` names the rung of the ladder it came from; quote `request_id` in events it causes."""

    request_id: RequestId
    model_version: ModelVersion
    profile_age_ms: int | None
    profile_events: int
    degraded: Degraded
    took_ms: float
    items: list[RecommendedItem]
    timings: dict[str, float] | None = None


class Asked(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What the gateway asks a ranker replica. `budget_s` is the time left; `profile` is as stored.

    `profile_missing` says that the store could not be read, so that None does not mean a new user.
    """

    request_id: RequestId
    request: RecommendationRequest
    profile: bytes | None
    now_ms: int
    budget_s: float
    profile_missing: bool = False


class RankedAnswer(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a ranker replica answers. `impression` is the encoded event, ready for Kafka. Timings in ms by stage."""

    model_version: ModelVersion
    degraded: Degraded
    items: list[RecommendedItem]
    impression: bytes
    timings: dict[str, float]
    waiting: int = 0


class VersionStats(msgspec.Struct, frozen=True, kw_only=True):
    """How a version has done in a replica since it was loaded there; times are of its newest answers.

    `below_top`: requests that missed the top rung. `errors`: those in which the model itself failed.
    """

    requests: int
    below_top: int
    errors: int
    score_p50_ms: float | None
    score_p99_ms: float | None


class ModelStatus(msgspec.Struct, frozen=True, kw_only=True):
    """What a replica has loaded. `refused` maps versions to why they could not be; `pending`: items to be encoded.

    `replica` names the replica for as long as it lives; `swaps` counts changes of the champion.
    """

    replica: str = ""
    serving: ModelVersion | None
    canary: ModelVersion | None = None
    precision: str | None
    loading: ModelVersion | None
    refused: dict[ModelVersion, str]
    items: int
    pending: int
    waiting: int
    swaps: int
    versions: dict[ModelVersion, VersionStats] = {}


Body = TypeVar("Body")

recommendation_decoder = msgspec.json.Decoder(RecommendationRequest)


def decode_body(decoder: msgspec.json.Decoder[Body], body: bytes) -> Body:
    """Returns the decoded body. Raises Problem 400 for what is not JSON, InvalidRecord naming the field otherwise."""
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as error:
        raise invalid_record(error) from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise Problem(400, "not-json", f"the body is not JSON: {error}") from error
    except RecursionError as error:
        raise InvalidRecord("nested too deeply") from error


def schemas_of(*types: Any) -> dict[str, Any]:
    """Returns OpenAPI component schemas of the given types and of all they refer to."""
    _, components = msgspec.json.schema_components(types, ref_template="#/components/schemas/{name}")
    return components
