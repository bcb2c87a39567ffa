"""Events from HTTP to Kafka: each record is judged alone, and accepted only once the broker has it."""

import asyncio
from collections import Counter
from collections.abc import Callable
from typing import Any, Literal

import msgspec
from kafka.errors import MessageSizeTooLargeError

from services.bodies import decode_body
from services.event_log import EventLog, Outgoing
from services.problem import Problem
from tailrace.errors import InvalidRecord
from tailrace.events import Click, Context, Event, Rating, encode, invalid_record

# The `type` of a posted event, the class it decodes to and the stream it goes to.
POSTED: dict[str, tuple[type[Event], str]] = {
    "click": (Click, "clicks"),
    "rating": (Rating, "ratings"),
    "context": (Context, "contexts"),
}

_posted_decoder: msgspec.json.Decoder[Any] = msgspec.json.Decoder()


class VerdictError(msgspec.Struct, frozen=True):
    """Why a record was not accepted, and which field is at fault (a JSON path within the record)."""

    field: str
    reason: str


class Verdict(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What became of one posted event. `retry`: the broker did not take it in time; send it again, same event_id."""

    status: Literal["accepted", "rejected", "retry"]
    event_id: str | None = None
    error: VerdictError | None = None


class IntakeAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """The verdict on each posted event, in the order they came."""

    accepted: int
    rejected: int
    retry: int
    verdicts: list[Verdict]

    @property
    def http_status(self) -> int:
        """200 if all were accepted; 207 if only some; 422 if all were rejected; 503 if the broker took none."""
        if self.accepted == len(self.verdicts):
            return 200
        if self.accepted:
            return 207
        return 503 if self.retry else 422


def decode_posted(body: bytes, max_events: int) -> list[Any]:
    """Returns the posted records, still unjudged. Raises Problem or InvalidRecord when the body is of no use at all."""
    posted = decode_body(_posted_decoder, body)
    if isinstance(posted, dict):
        return [posted]
    if not isinstance(posted, list):
        raise InvalidRecord("the body must be one event or an array of events")
    if len(posted) > max_events:
        raise Problem(413, "too-many-events", f"{len(posted)} events in one call; the most is {max_events}")
    return posted


def read_event(posted: Any, *, now_ms: int, max_ahead_s: float, new_id: Callable[[], str]) -> tuple[str, Event]:
    """Returns the stream and the event of one posted record. Raises InvalidRecord naming the field.

    An absent `event_id` is made by `new_id`, an absent `occurred_at` is `now_ms`. Unknown fields are ignored, as on
    the topics themselves: a newer producer can talk to an older gateway.
    """
    if not isinstance(posted, dict):
        raise InvalidRecord("an event is a JSON object")
    kind = posted.get("type")
    if not isinstance(kind, str) or kind not in POSTED:
        raise InvalidRecord(f"must be one of {', '.join(POSTED)}", field="$.type")
    event_type, stream = POSTED[kind]
    filled = {"event_id": new_id(), "occurred_at": now_ms, **posted}
    try:
        event = msgspec.convert(filled, event_type)
    except msgspec.ValidationError as error:
        raise invalid_record(error) from error
    if event.at_ms > now_ms + max_ahead_s * 1000:
        raise InvalidRecord(f"is more than {max_ahead_s:g} s ahead of the clock", field="$.occurred_at")
    return stream, event


async def take_events(
    posted: list[Any],
    event_log: EventLog,
    *,
    now_ms: int,
    max_ahead_s: float,
    ack_timeout_s: float,
    new_id: Callable[[], str],
) -> IntakeAnswer:
    """Returns the verdict on each posted record, once the broker has answered or `ack_timeout_s` has passed."""
    # 1. Judge each record alone: a verdict, or the place of its record among those to be sent.
    judged: list[Verdict | int] = []
    outgoing: list[Outgoing] = []
    events: list[Event] = []
    for record in posted:
        try:
            stream, event = read_event(record, now_ms=now_ms, max_ahead_s=max_ahead_s, new_id=new_id)
        except InvalidRecord as error:
            judged.append(_rejected(record, error))
        else:
            judged.append(len(outgoing))
            outgoing.append(Outgoing(stream, event.user_id, encode(event)))
            events.append(event)

    # 2. Hand the good ones over, and wait until the broker has them or the time is up.
    delivery = event_log.append(outgoing)
    await asyncio.wait([asyncio.wrap_future(delivery.finished)], timeout=ack_timeout_s)
    delivery.abandon()

    # 3. Say what became of each.
    verdicts = [
        one if isinstance(one, Verdict) else _delivered(events[one], delivery.outcomes[one], ack_timeout_s)
        for one in judged
    ]
    count = Counter(verdict.status for verdict in verdicts)
    return IntakeAnswer(accepted=count["accepted"], rejected=count["rejected"], retry=count["retry"], verdicts=verdicts)


def _rejected(record: Any, error: InvalidRecord) -> Verdict:
    event_id = record.get("event_id") if isinstance(record, dict) else None
    return Verdict(
        status="rejected",
        event_id=event_id if isinstance(event_id, str) else None,
        error=VerdictError(error.field, error.reason),
    )


def _delivered(event: Event, outcome: bool | Exception | None, ack_timeout_s: float) -> Verdict:
    if outcome is True:
        return Verdict(status="accepted", event_id=event.event_id)
    if isinstance(outcome, MessageSizeTooLargeError):
        error = VerdictError("$", "larger than the broker takes")
        return Verdict(status="rejected", event_id=event.event_id, error=error)
    reason = f"the broker did not confirm it within {ack_timeout_s:g} s" if outcome is None else f"broker: {outcome}"
    return Verdict(status="retry", event_id=event.event_id, error=VerdictError("$", reason))
