"""A recorded stream, folded as it was lived: profiles, counters and catalogue, by the functions that serve.

What stream workers, Kafka and the rankers' table readers do between them happens here in one process: events are
folded one by one, and the counters they changed are published and applied before anything is asked. So a feature at any
moment is what a ranker would have seen, with no delay.

Shapes: N candidates, F features.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from services.encodings import EncodedItems
from services.loaded_model import LoadedModel
from services.scorer import EncodedUsers
from tailrace.catalogue import Catalogue, Rows
from tailrace.cosines import Floats, history_items, make_cosines
from tailrace.counters import CounterTable, item_stats
from tailrace.events import UserEvent, encode
from tailrace.features import compute_features, utilities
from tailrace.fold import fold_event
from tailrace.ids import ItemId, UserId
from tailrace.items import Item
from tailrace.profile import Profile, current_context
from tailrace.responses import gather_responses
from tailrace.tastes import Tastes, make_tastes, sum_worth, tags_of
from tailrace.text import render_user

_PARTITION = 0
_PATIENCE_S = 600.0  # nobody waits for an answer here


@dataclass(frozen=True)
class Asked:
    """What a model is asked with: the user in words and encoded, the candidates, and their fresh numbers."""

    user_text: str
    user: EncodedUsers
    rows_N: Rows
    items: EncodedItems
    features_NF: Floats
    tastes: Tastes


class Replayed:
    """The state after the events so far. Feed it in time order."""

    def __init__(self) -> None:
        self.catalogue = Catalogue()
        self._counters = CounterTable()
        self._profiles: dict[UserId, Profile] = {}

    def profile(self, user_id: UserId) -> Profile:
        """Returns the user's profile as it stands. Do not change it."""
        return self._profiles.get(user_id) or Profile(user_id)

    def announce(self, items: Sequence[Item], at_ms: int) -> None:
        """Makes items available."""
        for item in items:
            self.catalogue.apply_item(item.item_id, encode(item), at_ms)

    def learn(self, event: UserEvent) -> None:
        """Folds one event, as a worker does."""
        profile = self._profiles.setdefault(event.user_id, Profile(event.user_id))
        item_id: ItemId | None = getattr(event, "item_id", None)
        fold_event(event, profile, self._counters, None if item_id is None else self.catalogue.item(item_id))

    def publish(self) -> None:
        """Publishes the counters that changed, as a worker does, and applies them, as a ranker does."""
        for changed in sorted(self._counters.dirty):
            stats = item_stats(changed, _PARTITION, self._counters.items[changed])
            self.catalogue.apply_stats(f"{_PARTITION}:{changed}", encode(stats), 0)
        self._counters.dirty.clear()

    def ask(self, model: LoadedModel, user_id: UserId, rows_N: Rows, now_ms: int) -> Asked:
        """Returns what `services.recommender.recommend` would ask the model with, for these candidates.

        Every one of them must have been encoded: `encode_all`.
        """
        self.publish()
        catalogue, encodings, profile = self.catalogue, model.encodings, self.profile(user_id)
        context = current_context(profile, now_ms)
        user_text = render_user(profile, context, None, catalogue.item, now_ms)
        user = model.encode_user(user_text, time.monotonic() + _PATIENCE_S)
        recent_rows = catalogue.rows(history_items(profile))
        ready, items = encodings.gather(rows_N)
        assert ready.all(), "an item was not encoded before it was ranked"
        cosines = make_cosines(items.vectors_ND, user.vectors_BD[0], None, encodings.vectors[recent_rows])
        responses = gather_responses(profile, catalogue.topics, now_ms)
        features_NF = compute_features(catalogue, rows_N, profile, context, False, cosines, now_ms, responses)
        tags_N = [[] if item is None else tags_of(item) for item in catalogue.items_at(rows_N)]
        return Asked(user_text, user, rows_N, items, features_NF, make_tastes(responses.answers, tags_N))


class EncodesItems(Protocol):
    """A model that encodes the items of a catalogue, chunk by chunk."""

    def catch_up(self, catalogue: Catalogue) -> bool:
        """Encodes the newest changes of the catalogue, up to one chunk, and returns whether more wait."""


def encode_all(model: EncodesItems, catalogue: Catalogue) -> None:
    """Encodes every item the model lacks."""
    while model.catch_up(catalogue):
        pass


def score(model: LoadedModel, asked: Asked, rating_weight: float) -> Floats:
    """Returns float32 [N]: the utilities that order a slate, from the model's graphs."""
    deadline = time.monotonic() + _PATIENCE_S
    tag_worth_N = sum_worth(model.tag_worth(asked.tastes.answers), asked.tastes.tags_NK)
    clicks_N, ratings_N = model.score(asked.user, asked.items, asked.features_NF, tag_worth_N, deadline)
    return utilities(clicks_N, ratings_N, rating_weight)
