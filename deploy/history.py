"""The demo's past: what readers were shown and did in the days before it began, as of a site that moves to Tailrace.

They were served by the functions that serve, and read as readers do (`deploy.simulated_days`). What became of it stands
in Kafka as if it had been logged then, so that the first round has something to learn.
"""

from collections.abc import Callable, Sequence

import numpy as np
from msgspec.structs import replace

from deploy.simulated_days import DAY_MS, FIRST_MS, Habits, Town
from services.encodings import EncodedItems
from services.loaded_model import LoadedModel
from services.scorer import EncodedUsers
from tailrace.cosines import Floats
from tailrace.events import UserEvent
from tailrace.features import NEUTRAL_RATING, prior_scores
from tailrace.items import Item
from tailrace.settings import Settings

DAYS = 2
_CANDIDATES = 80  # enough for slates of eight and their log; 200 would take twice as long


class Untrained:
    """Version 0 without its scoring graph: untrained, that says what the prior says, and takes minutes to say it."""

    def __init__(self, model: LoadedModel) -> None:
        self.version, self.encodings, self.prior = model.version, model.encodings, model.prior
        self.catch_up, self.tag_worth = model.catch_up, model.tag_worth
        self.encode_user, self.embed = model.encode_user, model.embed

    def score(
        self, user: EncodedUsers, items: EncodedItems, features_NF: Floats, tag_worth_N: Floats, deadline: float
    ) -> tuple[Floats, Floats]:
        """Returns the prior's scores [N], and ratings [N] that change no order."""
        return prior_scores(features_NF), np.full(len(features_NF), NEUTRAL_RATING, dtype=np.float32)


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
    """Returns the events of DAYS days that end at `until_ms`, in time order, each with the stream it belongs to.

    `model` must be an untrained one.
    """
    habits = Habits(
        readers=readers, readers_new_each_day=0, visits_a_day=visits_a_day, late_item_share=0.0, control_every=0
    )
    settings = replace(settings, ranker=replace(settings.ranker, num_candidates=_CANDIDATES))
    town = Town(items, habits, settings, seed)
    served = Untrained(model)
    for day in range(DAYS):

        def tell(done: int, total: int, day: int = day) -> None:
            progress(day * total + done, DAYS * total)

        town.live(day, served, served, tell)
    shift_ms = until_ms - FIRST_MS - DAYS * DAY_MS
    return [(stream, replace(event, occurred_at=event.at_ms + shift_ms)) for stream, event in town.log.in_time_order()]
