"""What a request finds: the context that holds for it, and how old the profile is. Pure."""

import msgspec

from services.bodies import RequestContext
from tailrace.events import Context, Scalar
from tailrace.ids import EventId, RequestId
from tailrace.profile import Profile, current_context


def merge_context(given: RequestContext | None, profile: Profile, request_id: RequestId, now_ms: int) -> Context | None:
    """Returns the context that holds for this request: the user's current one, overridden by what the caller says."""
    held = current_context(profile, now_ms)
    if given is None:
        return held
    told = {name: value for name, value in msgspec.structs.asdict(given).items() if value}
    if held is None or "country" in told or "locale" in told:
        told["occurred_at"] = now_ms  # the zone of the old stamp no longer tells where the user is
    if held is None:
        return Context(event_id=EventId(request_id), user_id=profile.user_id, **told)
    return msgspec.structs.replace(held, **told)


def flat_context(context: Context | None) -> dict[str, Scalar]:
    """Returns the context as an impression carries it: attributes and named fields in one flat table."""
    if context is None:
        return {}
    named = {name: getattr(context, name) for name in RequestContext.__struct_fields__ if name != "attributes"}
    return {**context.attributes, **{name: value for name, value in named.items() if value is not None}}


def profile_age_ms(profile: Profile, now_ms: int) -> int | None:
    """Returns how long ago the newest event of the profile happened, in ms; None for an empty profile."""
    return None if profile.last_at_ms is None else max(now_ms - profile.last_at_ms, 0)
