"""A simulated world with a known answer: readers with hidden tastes, whose best attainable click rate is known.

Pure and seeded. The recommender never sees a taste; the world never sees a model. How a reader looks at a slate is the
position-based model of Craswell et al. (2008): an item is clicked if its position is examined and it attracts.

Tastes run in circles of readers, as they do in life: whoever likes castles likes ghosts, and the ghost stories of one
author. So what one reader clicks tells of what the others of the circle would, which no cosine of two texts knows and
a model can learn.

Shapes: I items, T tags and entities ("themes"), K circles.
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
_BASE_LOGIT = -4.5
_TASTE_LOGIT = 12.0
_MOST = 0.4  # even what suits a reader perfectly is opened no more often than this
_QUALITY_SPREAD = 0.3
_CIRCLES = 8
_CIRCLE_TAGS, _CIRCLE_ADMIRED = 6, 2
_SECOND_CIRCLE, _OF_ONES_OWN = 0.4, 0.3  # of a reader's taste, beside a main circle's 1
_ENTITY_WEIGHT = 0.3  # of an author, a setting, a period, beside a tag's 1
_ADMIRED = ("author:", "director:", "artist:", "brand:", "source:", "series:")
_LIGHT = frozenset({"tag:humour", "tag:comedy", "tag:children", "tag:adventure", "tag:mystery"})  # for evenings
_LIGHT_LOGIT = 0.8
_PATIENCE = (0.7, 1.0)
_LATER, _LATER_S = 0.15, 1200.0  # of what is opened is put aside first, half of it for longer than that
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

    A theme is a tag or an entity of the catalogue, each a direction of its own. A circle likes a handful of tags that
    often stand together, and two authors of such items; a reader belongs to one circle, leans to another, and has a tag
    of their own. What a reader likes can be told from what they and their circle clicked, and from nothing else.

    An examined item is clicked with the chance `most` / (1 + exp(-logit)); a logit rises by `slopes_IT` @ taste_T.
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
        self.most = _MOST
        self.slopes_IT: Floats = _TASTE_LOGIT * raw_IT / np.maximum(np.linalg.norm(raw_IT, axis=1, keepdims=True), 1e-9)
        self._slopes_TI: Floats = np.ascontiguousarray(self.slopes_IT.T)
        rng = np.random.default_rng(seed)
        self._quality_I: Floats = rng.normal(scale=_QUALITY_SPREAD, size=len(items))
        self._light_I: Floats = np.array([0.0 if _LIGHT.isdisjoint(of) else 1.0 for of in item_themes])
        self._circles_KT = self._draw_circles(rng)

    def reader(self, number: int, *, seed: int = 0) -> Reader:
        """Returns reader `number`: what they like, and what their taste drifts to."""
        rng = np.random.default_rng([seed, number])
        return Reader(
            user_id=UserId(f"reader-{seed}-{number:05d}"),
            taste_T=self.draw_taste(rng),
            drift_T=self.draw_taste(rng),
            patience=float(rng.uniform(*_PATIENCE)),
        )

    def draw_taste(self, rng: np.random.Generator) -> Floats:
        """Returns float64 [T] of unit length: the taste of somebody."""
        main, second = rng.choice(len(self._circles_KT), size=2, replace=False)
        taste_T = self._circles_KT[main] + _SECOND_CIRCLE * self._circles_KT[second]
        taste_T[self._column[str(rng.choice(self._likable))]] += _OF_ONES_OWN
        return _unit(taste_T)

    def _draw_circles(self, rng: np.random.Generator) -> Floats:
        """Returns float64 [K, T], unit rows. A circle grows from a tag that no other has, by tags that go with it."""
        tags = np.array([self._column[theme] for theme in self._likable])
        admirable = np.array([self._column[theme] for theme in self._admirable], dtype=np.int64)
        held_IT = (self.slopes_IT > 0).astype(np.float64)
        together_TT = held_IT.T @ held_IT
        common_T = np.sqrt(np.maximum(np.diag(together_TT), 1.0))
        affinity_TT = together_TT / common_T[:, None] / common_T[None, :]
        taken: set[int] = set()
        circles_KT = np.zeros((_CIRCLES, len(self._column)))
        for circle_T in circles_KT:
            free = [tag for tag in tags.tolist() if tag not in taken] or tags.tolist()
            members = [int(rng.choice(free))]
            while len(members) < min(_CIRCLE_TAGS, len(tags)):
                others = np.setdiff1d(tags, members)
                shared = np.array([0.5 if tag in taken else 1.0 for tag in others.tolist()])
                nearest = others[np.argsort(-affinity_TT[members][:, others].sum(0) * shared, kind="stable")[:3]]
                members.append(int(rng.choice(nearest)))
            taken |= set(members)
            circle_T[members] = rng.uniform(0.5, 1.0, size=len(members))
            fitting = np.argsort(-together_TT[members][:, admirable].sum(0), kind="stable")[:_CIRCLE_ADMIRED]
            circle_T[admirable[fitting]] = 0.5
            circle_T /= np.linalg.norm(circle_T)
        return circles_KT

    def attraction(self, reader: Reader, moment: Moment) -> Floats:
        """Returns float64 [I]: the probability that the reader, having examined an item, clicks it."""
        angle = moment.hours / 24.0 / _DRIFT_DAYS
        taste_T = np.cos(angle) * reader.taste_T + np.sin(angle) * reader.drift_T
        themes = np.flatnonzero(taste_T)  # a few dozen of a thousand
        logits_I = self.usual_logits(moment) + taste_T[themes] @ self._slopes_TI[themes] + self._quality_I
        attraction_I: Floats = self.most / (1.0 + np.exp(-logits_I))
        for item_id in reader.read:
            attraction_I[self._row[item_id]] *= 0.05
        return attraction_I

    def usual_logits(self, moment: Moment | None) -> Floats:
        """Returns float64 [I]: what draws people to items of middling quality that are nothing to them, by moment."""
        light = moment is not None and (moment.evening or moment.device == "mobile")
        result: Floats = _BASE_LOGIT + (_LIGHT_LOGIT * light) * self._light_I
        return result

    def examination(self, reader: Reader, n: int) -> Floats:
        """Returns float64 [n]: the probability that the reader looks at each position."""
        result: Floats = reader.patience / (1.0 + _POSITION_DECAY * np.arange(n))
        return result

    def usual_examination(self, n: int) -> Floats:
        """Returns float64 [n]: the same of a reader of middling patience."""
        result: Floats = sum(_PATIENCE) / 2 / (1.0 + _POSITION_DECAY * np.arange(n))
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
                dwell_s = float(rng.lognormal(mean=3.0 + 2.0 * joy, sigma=0.5))
                # Most is opened as it is seen; some of it when there is time, long after others have seen newer slates.
                opened_s = seconds
                if rng.random() < _LATER:
                    opened_s += float(rng.lognormal(mean=np.log(_LATER_S), sigma=1.0))
                reactions.append(Reaction(item_id, position, "click", opened_s, dwell_s))
                reader.read.add(item_id)
                if rng.random() < joy:
                    stars = int(np.clip(round(2.2 + 6.0 * joy + rng.normal(scale=0.5)), 1, 5))
                    action: Literal["like", "save"] = "like" if rng.random() < 0.7 else "save"
                    reactions.append(Reaction(item_id, position, action, opened_s + 1.0, rating=stars))
            elif joy < 0.01 and rng.random() < 0.1:
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
