"""A simulated world with a known answer: readers with hidden tastes, whose best attainable click rate is known.

Pure and seeded. The recommender never sees a taste; the world never sees a model. How a reader looks at a slate is the
position-based model of Craswell et al. (2008): an item is clicked if its position is examined and it attracts.

Shapes: I items, T tags and entities ("themes").
"""

from collections import Counter
from collections.abc import Sequence
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
_BASE_LOGIT = -5.0
_TASTE_LOGIT = 10.0
_ENTITY_WEIGHT = 0.3  # of an author, a setting, a period, beside a tag's 1
_ADMIRED = ("author:", "director:", "artist:", "brand:", "source:", "series:")
_LIGHT = frozenset({"tag:humour", "tag:comedy", "tag:children", "tag:adventure", "tag:mystery"})  # for evenings
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
    taste_T: Floats
    drift_T: Floats
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
    """Items, their themes, and the readers' laws. Everything follows from `items` and `seed`.

    A theme is a tag or an entity of the catalogue, each a direction of its own: what a reader likes can be told from
    what they clicked, and from nothing else.
    """

    def __init__(self, items: Sequence[Item], *, seed: int = 0) -> None:
        self.item_ids = [item.item_id for item in items]
        self._row = {item_id: row for row, item_id in enumerate(self.item_ids)}
        item_themes = [frozenset(item.topics_of_interest) for item in items]
        holders = Counter(theme for of in item_themes for theme in of)
        themes = sorted(holders)
        self._column = {theme: column for column, theme in enumerate(themes)}
        self._likable = [theme for theme in themes if theme.startswith("tag:")]
        self._admirable = [theme for theme in themes if theme.startswith(_ADMIRED) and holders[theme] > 2]
        raw_IT = np.zeros((len(items), len(themes)))
        for row, of in enumerate(item_themes):
            for theme in of:
                raw_IT[row, self._column[theme]] = 1.0 if theme.startswith("tag:") else _ENTITY_WEIGHT
        self._themes_IT: Floats = raw_IT / np.maximum(np.linalg.norm(raw_IT, axis=1, keepdims=True), 1e-9)
        self._quality_I: Floats = np.random.default_rng(seed).normal(scale=0.5, size=len(items))
        self._light_I: Floats = np.array([0.0 if _LIGHT.isdisjoint(of) else 1.0 for of in item_themes])

    def reader(self, number: int, *, seed: int = 0) -> Reader:
        """Returns reader `number`: two to four liked tags, often an author too, and what their taste drifts to."""
        rng = np.random.default_rng([seed, number])
        return Reader(
            user_id=UserId(f"reader-{seed}-{number:05d}"),
            taste_T=self._taste(rng),
            drift_T=self._taste(rng),
            patience=float(rng.uniform(0.7, 1.0)),
        )

    def _taste(self, rng: np.random.Generator) -> Floats:
        taste_T = np.zeros(len(self._column))
        for theme in rng.choice(self._likable, size=int(rng.integers(2, 5)), replace=False):
            taste_T[self._column[theme]] = rng.uniform(0.6, 1.0)
        if self._admirable and rng.random() < 0.5:
            taste_T[self._column[str(rng.choice(self._admirable))]] = 0.6
        return _unit(taste_T)

    def attraction(self, reader: Reader, moment: Moment) -> Floats:
        """Returns float64 [I]: the probability that the reader, having examined an item, clicks it."""
        angle = moment.hours / 24.0 / _DRIFT_DAYS
        taste_T = np.cos(angle) * reader.taste_T + np.sin(angle) * reader.drift_T
        logits_I = _BASE_LOGIT + _TASTE_LOGIT * (self._themes_IT @ taste_T) + self._quality_I
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
        return sorted(reactions, key=lambda reaction: reaction.delay_s)

    def expected_clicks(self, reader: Reader, slate: Sequence[ItemId], moment: Moment) -> float:
        """Returns the expected number of clicks on a slate."""
        rows = self.rows(slate)
        return float(self.attraction(reader, moment)[rows] @ self.examination(reader, len(rows)))

    def best_slate(
        self, reader: Reader, n: int, moment: Moment, *, among: Sequence[ItemId] | None = None
    ) -> list[ItemId]:
        """Returns the slate with the most expected clicks: nothing does better in this world. `among` None: all."""
        rows = np.arange(len(self.item_ids)) if among is None else self.rows(among)
        best = np.argsort(-self.attraction(reader, moment)[rows], kind="stable")[:n]
        return [self.item_ids[row] for row in rows[best]]

    def rows(self, item_ids: Sequence[ItemId]) -> NDArray[np.int64]:
        """Returns int64: where these items stand in `attraction`. Raises KeyError for an item of no such world."""
        return np.array([self._row[item_id] for item_id in item_ids], dtype=np.int64)

    def moment(self, at_s: float, rng: np.random.Generator) -> Moment:
        """Returns the moment of a visit `at_s` seconds after the world began, on a device drawn at random."""
        return Moment(hours=at_s / 3600.0, device=DEVICES[int(rng.integers(len(DEVICES)))])


def _unit(vector: Floats) -> Floats:
    result: Floats = vector / max(float(np.linalg.norm(vector)), 1e-9)
    return result
