"""How fast a Click is decoded and checked, with msgspec and with pydantic, on the same bytes in the same run."""

import time
from collections.abc import Callable
from typing import Annotated

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field
from rich.console import Console

from tailrace.events import Action, decode_event
from tests.bench.report import Row

_NUM_EVENTS = 20_000
_ROUNDS = 5

_Id = Annotated[str, Field(min_length=1, max_length=256)]


class _PydanticClick(BaseModel):
    """`tailrace.events.Click` as pydantic would have it: the same fields, the same bounds, unknown fields ignored."""

    model_config = ConfigDict(frozen=True, extra="ignore", strict=False)

    event_id: _Id
    user_id: _Id
    occurred_at: AwareDatetime | Annotated[int, Field(strict=True, ge=0, le=253_402_300_799_000)]
    schema_version: Annotated[int, Field(ge=1, le=1_000_000)] = 1
    item_id: _Id
    request_id: _Id | None = None
    position: Annotated[int, Field(ge=0)] | None = None
    action: Action = "click"
    dwell_s: Annotated[float, Field(ge=0, le=31_536_000)] | None = None


def bench_decoding(console: Console | None = None) -> list[Row]:
    """Returns events per second of each decoder on Clicks with ISO times, and their ratio: the best of five rounds."""
    values = [
        b'{"event_id":"event-%d","user_id":"user-%d","item_id":"item-%d","occurred_at":"2026-03-01T18:%02d:05.250+01:00",'
        b'"action":"like","dwell_s":41.5,"request_id":"request-%d","position":2}'
        % (number, number % 997, number % 499, number % 60, number)
        for number in range(_NUM_EVENTS)
    ]
    msgspec_rate = _rate(lambda value: decode_event("clicks", value), values)
    pydantic_rate = _rate(_PydanticClick.model_validate_json, values)
    return [
        {"name": "decode and check a click, msgspec", "value": msgspec_rate, "unit": "events/s"},
        {"name": "decode and check a click, pydantic", "value": pydantic_rate, "unit": "events/s"},
        {"name": "msgspec over pydantic", "value": msgspec_rate / pydantic_rate, "unit": "times"},
    ]


def _rate(decode: Callable[[bytes], object], values: list[bytes]) -> float:
    fastest_s = float("inf")
    for _ in range(_ROUNDS):
        begin = time.perf_counter()
        for value in values:
            decode(value)
        fastest_s = min(fastest_s, time.perf_counter() - begin)
    return len(values) / fastest_s
