"""A simulated world with a known answer: readers with hidden tastes, whose best attainable click rate is known.

Pure and seeded. The recommender never sees a taste; the world never sees a model. How a reader looks at a slate is the
position-based model of Craswell et al. (2008): an item is clicked if its position is examined and it attracts.

Shapes: I items, T tags and entities ("themes"), D latent dimensions.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from tailrace.ids import ItemId, UserId
from tailrace.items import Item

Floats = NDArray[np.floating]
Device = Literal["mobile", "desktop", "reader"]
DEVICES: tuple[Device, ...] = ("mobile", "desktop", "reader")

_POSITION_DECAY = 0.12  # examination falls as 1 / (1 + decay * position)
_BASE_LOGIT = -4.6
_TASTE_LOGIT = 6.0
_DRIFT_DAYS = 20.0  # after about so many days a taste has turned by a radian


@dataclass(frozen=True)
class Moment:
    """Where a reader is: hours since the world began and the device in hand."""

    hours: float
    device: Device

    @property
    def evening(self) -> bool:
        """Whether it is between 18 and 24 hours, when readers want something lighter."""
        return 18 <= self.hours % 24 < 24


@dataclass
class Reader:
    """One simulated user. `read` holds what they have clicked: nobody reads the same book twice with the same joy."""

    user_id: UserId
    taste_D: Floats
    drift_D: Floats
    patience: float
    read: set[ItemId] = field(default_factory=set)


@dataclass(frozen=True)
class Reaction:
    """What a reader does about one item of a slate, `delay_s` after seeing it. `rating` is on 1 to 5."""

    item_id: ItemId
    position: int
    action: Literal["click", "like", "save", "skip"]
    delay_s: float
    dwell_s: float | None = None
    rating: int | None = None


class World:
    """Items, their latent themes, and the readers' laws. Everything follows from `items` and `seed`."""

    def __init__(self, items: Sequence[Item], *, seed: int = 0, dimensions: int = 12) -> None:
        self.item_ids = [item.item_id for item in items]
        self._row = {item_id: row for row, item_id in enumerate(self.item_ids)}
        rng = np.random.default_rng(seed)
        themes = sorted({theme for item in items for theme in item.topics_of_interest})
        self._themes = [theme for theme in themes if theme.startswith("tag:")]
        vectors: Mapping[str, Floats] = {
            theme: rng.normal(size=dimensions) * (1.0 if theme.startswith("tag:") else 0.6) for theme in themes
        }
        self._theme_vectors = vectors
        item_themes = [frozenset(item.topics_of_interest) for item in items]
        raw_ID = np.stack([np.sum([vectors[theme] for theme in sorted(of)], axis=0) for of in item_themes])
        self._latent_ID: Floats = raw_ID / np.maximum(np.linalg.norm(raw_ID, axis=1, keepdims=True), 1e-9)
        self._quality_I: Floats = rng.normal(scale=0.6, size=len(items))
        self._light_I: Floats = np.array(
            [1.0 if {"tag:humour", "tag:children", "tag:adventure", "tag:mystery"} & of else 0.0 for of in item_themes]
        )

    def reader(self, number: int, *, seed: int = 0) -> Reader:
        """Returns reader `number`: two to four liked themes, their mixture as taste, and a direction of drift."""
        rng = np.random.default_rng([seed, number])
        liked = list(rng.choice(self._themes, size=int(rng.integers(2, 5)), replace=False))
        weights = rng.uniform(0.6, 1.0, size=len(liked))
        liked_TD = np.stack([self._theme_vectors[theme] for theme in liked])
        return Reader(
            user_id=UserId(f"reader-{seed}-{number:05d}"),
            taste_D=_unit(np.average(liked_TD, axis=0, weights=weights)),
            drift_D=_unit(rng.normal(size=self._latent_ID.shape[1:])),
            patience=float(rng.uniform(0.7, 1.0)),
        )

    def attraction(self, reader: Reader, moment: Moment) -> Floats:
        """Returns float64 [I]: the probability that the reader, having examined an item, clicks it."""
        angle = moment.hours / 24.0 / _DRIFT_DAYS
        taste_D = np.cos(angle) * reader.taste_D + np.sin(angle) * reader.drift_D
        logits_I = _BASE_LOGIT + _TASTE_LOGIT * (self._latent_ID @ taste_D) + self._quality_I
        if moment.evening or moment.device == "mobile":
            logits_I = logits_I + 0.8 * self._light_I
        attraction_I: Floats = 1.0 / (1.0 + np.exp(-logits_I))
        for item_id in reader.read:
            attraction_I[self._row[item_id]] *= 0.05
        return attraction_I

    def examination(self, reader: Reader, n: int) -> Floats:
        """Returns float64 [n]: the probability that the reader looks at each position."""
        result: Floats = reader.patience / (1.0 + _POSITION_DECAY * np.arange(n))
        return result

    def react(
        self, reader: Reader, slate: Sequence[ItemId], moment: Moment, rng: np.random.Generator
    ) -> list[Reaction]:
        """Returns what the reader does about a slate, in time order. Notes the clicks in `reader.read`."""
        attraction_I = self.attraction(reader, moment)
        reactions: list[Reaction] = []
        seconds = 0.0
        for position, (item_id, examine) in enumerate(zip(slate, self.examination(reader, len(slate)), strict=True)):
            seconds += float(rng.lognormal(mean=-0.5, sigma=0.6))
            if rng.random() >= examine:
                continue
            joy = float(attraction_I[self._row[item_id]])
            if rng.random() < joy:
                dwell_s = float(rng.lognormal(mean=3.0 + joy, sigma=0.5))
                reactions.append(Reaction(item_id, position, "click", seconds, dwell_s))
                reader.read.add(item_id)
                if rng.random() < 0.5 * joy:
                    stars = int(np.clip(round(2.2 + 3.0 * joy + rng.normal(scale=0.5)), 1, 5))
                    action: Literal["like", "save"] = "like" if rng.random() < 0.7 else "save"
                    reactions.append(Reaction(item_id, position, action, seconds + 1.0, rating=stars))
            elif joy < 0.02 and rng.random() < 0.1:
                reactions.append(Reaction(item_id, position, "skip", seconds))
        return reactions

    def expected_clicks(self, reader: Reader, slate: Sequence[ItemId], moment: Moment) -> float:
        """Returns the expected number of clicks on a slate."""
        rows = [self._row[item_id] for item_id in slate]
        return float(self.attraction(reader, moment)[rows] @ self.examination(reader, len(rows)))

    def best_slate(self, reader: Reader, n: int, moment: Moment) -> list[ItemId]:
        """Returns the slate with the most expected clicks: nothing does better in this world."""
        rows = np.argsort(-self.attraction(reader, moment), kind="stable")[:n]
        return [self.item_ids[row] for row in rows]

    def moment(self, at_s: float, rng: np.random.Generator) -> Moment:
        """Returns the moment of a visit `at_s` seconds after the world began, on a device drawn at random."""
        return Moment(hours=at_s / 3600.0, device=DEVICES[int(rng.integers(len(DEVICES)))])


def _unit(vector: Floats) -> Floats:
    result: Floats = vector / max(float(np.linalg.norm(vector)), 1e-9)
    return result
