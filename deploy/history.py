"""The demo's past: what readers were shown and did in the days before it began, as of a site that moves to Tailrace.

They were served by the functions that serve and read as readers do (`deploy.simulated_days`), but for the text model,
which would take minutes: slates come from version 0's prior over counters, cosines and topics, and say so. What became
of them stands in Kafka as if it had been logged then, so the first round has something to learn.
"""

from collections.abc import Callable, Sequence
from typing import NoReturn

from msgspec.structs import replace

from deploy.simulated_days import DAY_MS, FIRST_MS, Habits, Town
from services.loaded_model import LoadedModel
from tailrace.errors import TooLate
from tailrace.events import UserEvent
from tailrace.items import Item
from tailrace.settings import Settings

DAYS = 2
_CANDIDATES = 80  # enough for slates of eight and their log; 200 would take twice as long


class WithoutText:
    """A loaded model whose text half is never there in time: a `simulated_days.ServingModel`."""

    def __init__(self, model: LoadedModel) -> None:
        self.version, self.encodings, self.prior = model.version, model.encodings, model.prior
        self.catch_up, self.tag_worth, self.score = model.catch_up, model.tag_worth, model.score

    def encode_user(self, text: str, deadline: float) -> NoReturn:
        raise TooLate("texts are not read here")

    def embed(self, text: str, deadline: float) -> NoReturn:
        raise TooLate("texts are not read here")


def live_past(
    items: Sequence[Item],
    settings: Settings,
    model: LoadedModel,
    *,
    readers: int,
    visits_a_day: int,
    until_ms: int,
    seed: int,
    progress: Callable[[int, int], None],
) -> list[tuple[str, UserEvent]]:
    """Returns the events of DAYS days that end at `until_ms`, in time order, each with the stream it belongs to."""
    habits = Habits(
        readers=readers,
        readers_new_each_day=0,
        visits_a_day=visits_a_day,
        late_item_share=0.0,
        control_every=DAYS * visits_a_day + 1,
        rung="no_text",
    )
    settings = replace(settings, ranker=replace(settings.ranker, num_candidates=_CANDIDATES))
    town = Town(items, habits, settings, seed)
    served = WithoutText(model)
    for day in range(DAYS):

        def tell(done: int, total: int, day: int = day) -> None:
            progress(day * total + done, DAYS * total)

        town.live(day, served, served, tell)
    shift_ms = until_ms - FIRST_MS - DAYS * DAY_MS
    return [(stream, replace(event, occurred_at=event.at_ms + shift_ms)) for stream, event in town.log.in_time_order()]
