"""Simulated readers living through days in one process, served by the functions that serve.

Nothing here is a model of Tailrace: `services.recommender.recommend` ranks, `tailrace.fold` folds, impressions, clicks
and ratings are the events of the log, and training reads them. What is left out is Kafka, Ray and HTTP, so that a day
takes a minute. The world (`tailrace.world`) knows what each slate is worth, so arms that nobody sees can be compared
on the very same visits, without the noise of who happened to click.
"""

import heapq
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, cast

import numpy as np

from deploy.informed import Informed
from deploy.replayed import EncodesItems, Replayed, encode_all
from services.bodies import Asked, RecommendationRequest, RequestContext
from services.recommender import TextModel, recommend
from tailrace.counters import HALF_LIVES_S
from tailrace.events import Click, Impression, Rating, UserEvent, decode_event
from tailrace.ids import EventId, ItemId, RequestId
from tailrace.items import Item
from tailrace.profile import encode_profile
from tailrace.settings import Settings
from tailrace.world import Moment, Reaction, Reader, World

ARMS = ("recommended", "control", "popular", "fresh popular", "random", "informed", "oracle")
DAY_MS = 86_400_000
FIRST_MS = 1_790_000_000_000
_PATIENCE_S = 60.0
_DAY, _WEEK = HALF_LIVES_S.index(86_400.0), HALF_LIVES_S.index(604_800.0)
_HEAT_FLOOR = 0.5  # half a user for everyone, as in `services.popular`: or news is last


@dataclass(frozen=True)
class Habits:
    """How the simulated town lives."""

    readers: int = 250
    readers_new_each_day: int = 25
    visits_a_day: int = 2000
    slate: int = 8
    late_item_share: float = 0.15  # of the catalogue appears only as the days go by
    late_over_days: int = 5
    control_every: int = 4  # visits on which the first model ranks too, at the same cost; 0: never


@dataclass
class ArmTally:
    """What an arm's slates were worth."""

    expected_clicks: float = 0.0
    shown: int = 0

    @property
    def click_rate(self) -> float:
        """Expected clicks per item shown; NaN before any was."""
        return self.expected_clicks / self.shown if self.shown else float("nan")

    def add(self, expected_clicks: float, shown: int) -> None:
        """Counts one slate."""
        self.expected_clicks += expected_clicks
        self.shown += shown


@dataclass(frozen=True)
class DayFigures:
    """One day: which version served, what each arm was worth, and the difference to control on the same visits."""

    day: int
    version: str
    arms: dict[str, ArmTally]
    paired: list[tuple[str, float, float]]  # the reader, and expected clicks of (recommended, control), slate by slate
    clicks: int

    def lift_share(self, best: str = "informed") -> float:
        """The part reached of what lies between random and the arm `best`, 0 to 1.

        "informed" is the most that could be known from what the log shows; "oracle" is what readers like.
        """
        random, most = self.arms["random"].click_rate, self.arms[best].click_rate
        return (self.arms["recommended"].click_rate - random) / (most - random)


@dataclass
class Log:
    """What Kafka would hold."""

    impressions: list[Impression] = field(default_factory=list)
    clicks: list[Click] = field(default_factory=list)
    ratings: list[Rating] = field(default_factory=list)

    def append(self, event: UserEvent) -> None:
        """Adds one event to its stream."""
        match event:
            case Impression():
                self.impressions.append(event)
            case Click():
                self.clicks.append(event)
            case Rating():
                self.ratings.append(event)

    def in_time_order(self) -> list[tuple[str, UserEvent]]:
        """Returns every event with its stream; what was shown comes before what became of it."""
        streams: dict[str, Sequence[UserEvent]] = {
            "impressions": self.impressions,
            "clicks": self.clicks,
            "ratings": self.ratings,
        }
        found = [(stream, event) for stream, events in streams.items() for event in events]
        return sorted(found, key=lambda one: (one[1].at_ms, isinstance(one[1], Click | Rating)))


class ServingModel(TextModel, EncodesItems, Protocol):
    """What a town is recommended to by: a model that ranks, and that encodes what is announced."""


class Town:
    """The readers, the state of the recommender, and the log, as the days go by. Everything follows from the seed."""

    def __init__(self, items: Sequence[Item], habits: Habits, settings: Settings, seed: int) -> None:
        self.world = World(items, seed=seed)
        self._informed = Informed(self.world, seed=seed)
        self.state = Replayed()
        self.log = Log()
        self._habits = habits
        self._settings = settings
        self._seed = seed
        self._rng = np.random.default_rng([seed, 77])
        self._readers: list[Reader] = []
        self._numbers = itertools.count()
        self._ahead: list[tuple[int, int, UserEvent]] = []  # (when, tie, event): what readers have yet to do
        self._open: list[ItemId] = []
        order = self._rng.permutation(len(items))
        late = int(habits.late_item_share * len(items))
        self._late = [items[row] for row in order[:late]]
        self._announce([items[row] for row in order[late:]], FIRST_MS)
        self._arrive(habits.readers)

    def live(
        self, day: int, model: ServingModel, control: ServingModel, progress: Callable[[int, int], None]
    ) -> DayFigures:
        """Lives one day, counted from 0, on the model's recommendations. Returns what the day was worth."""
        habits, clicks_before = self._habits, len(self.log.clicks)
        # 1. A day brings readers and items.
        if day:
            self._arrive(habits.readers_new_each_day)
        share = len(self._late) // max(habits.late_over_days - day, 1)
        new_items, self._late = self._late[:share], self._late[share:]
        self._announce(new_items, FIRST_MS + day * DAY_MS)
        encode_all(model, self.state.catalogue)
        encode_all(control, self.state.catalogue)
        # 2. Visits in time order; between them, what earlier visitors do late.
        arms = {arm: ArmTally() for arm in ARMS}
        paired: list[tuple[str, float, float]] = []
        times = np.sort(self._rng.uniform(0, DAY_MS, habits.visits_a_day)).astype(np.int64)
        for number, since_ms in enumerate(times.tolist()):
            now_ms = FIRST_MS + day * DAY_MS + since_ms
            self._catch_up(now_ms)
            self.state.publish()
            user_id, worth = self._visit(now_ms, number, model, control)
            for arm, (expected, shown) in worth.items():
                arms[arm].add(expected, shown)
            if "control" in worth:
                paired.append((user_id, worth["recommended"][0], worth["control"][0]))
            progress(number + 1, len(times))
        self._catch_up(FIRST_MS + (day + 1) * DAY_MS)
        return DayFigures(day, model.version, arms, paired, len(self.log.clicks) - clicks_before)

    def _visit(
        self, now_ms: int, number: int, model: ServingModel, control: ServingModel
    ) -> tuple[str, dict[str, tuple[float, int]]]:
        """Returns who came, and of each arm what its slate was worth and how many items it showed."""
        reader = self._readers[int(self._rng.integers(len(self._readers)))]
        moment = self.world.moment((now_ms - FIRST_MS) / 1000, self._rng)
        n = self._habits.slate
        # 1. What the recommender shows.
        slate, impression = self._recommend(model, reader, moment, now_ms)
        # 2. What each arm's slate is worth to this reader at this moment. Nobody knows yet what was shown: control,
        #    told of it, would shun what it was about to show itself.
        slates = {"recommended": slate} | self._rules(reader, moment, now_ms)
        if self._habits.control_every and number % self._habits.control_every == 0:
            slates["control"] = self._recommend(control, reader, moment, now_ms)[0]
            unread = [item_id for item_id in self._open if item_id not in reader.read]
            slates["informed"] = self._informed.slate(reader.user_id, moment, n, unread)
        worth = {arm: (self.world.expected_clicks(reader, shown, moment), len(shown)) for arm, shown in slates.items()}
        attraction = float(np.mean(self.world.attraction(reader, moment)[self.world.rows(self._open)]))
        worth["random"] = (attraction * float(self.world.examination(reader, n).sum()), n)
        # 3. It is logged, and the reader does something about it, now or later.
        self._happen(impression)
        reactions = self.world.react(reader, slate, moment, self._rng)
        for reaction in reactions:
            self._react(reader, reaction, impression, now_ms)
        self._informed.learn(reader.user_id, slate, {one.item_id for one in reactions if one.action == "click"})
        return reader.user_id, worth

    def _recommend(
        self, model: ServingModel, reader: Reader, moment: Moment, now_ms: int
    ) -> tuple[list[ItemId], Impression]:
        asked = Asked(
            request_id=RequestId(f"lab-{self._seed}-{len(self.log.impressions)}"),
            request=RecommendationRequest(
                user_id=reader.user_id, n=self._habits.slate, context=RequestContext(device=moment.device)
            ),
            profile=encode_profile(self.state.profile(reader.user_id)),
            now_ms=now_ms,
            budget_s=_PATIENCE_S,
        )
        answer = recommend(asked, self.state.catalogue, model, self._settings.ranker, self._settings.slate)
        assert answer.degraded == "none", f"{model.version} answered from the rung {answer.degraded}"
        impression = cast(Impression, decode_event("impressions", answer.impression))
        return [item.item_id for item in answer.items], impression

    def _rules(self, reader: Reader, moment: Moment, now_ms: int) -> dict[str, list[ItemId]]:
        catalogue, n = self.state.catalogue, self._habits.slate
        unread = [item_id for item_id in self._open if item_id not in reader.read]
        rows = catalogue.rows(unread)
        week_N, day_N = (catalogue.trend("users", half_life, now_ms)[rows] for half_life in (_WEEK, _DAY))
        age_h_N = np.maximum(now_ms - catalogue.created_ms()[rows], 0) / 3_600_000
        fresh_N = (day_N + _HEAT_FLOOR) / np.sqrt(age_h_N + 1.0)
        return {
            "popular": [unread[index] for index in np.argsort(-week_N, kind="stable")[:n]],
            "fresh popular": [unread[index] for index in np.argsort(-fresh_N, kind="stable")[:n]],
            "oracle": self.world.best_slate(reader, n, moment, among=self._open),
        }

    def _react(self, reader: Reader, reaction: Reaction, impression: Impression, now_ms: int) -> None:
        at_ms = now_ms + int(reaction.delay_s * 1000)
        stamp: dict[str, Any] = {
            "user_id": reader.user_id,
            "item_id": reaction.item_id,
            "request_id": impression.request_id,
            "position": reaction.position,
            "occurred_at": at_ms,
        }
        name = f"{impression.request_id}-{reaction.position}-{reaction.action}"
        self._later(Click(event_id=EventId(name), action=reaction.action, dwell_s=reaction.dwell_s, **stamp))
        if reaction.rating is not None:
            self._later(Rating(event_id=EventId(f"{name}-rated"), value=float(reaction.rating), **stamp))

    def _later(self, event: UserEvent) -> None:
        heapq.heappush(self._ahead, (event.at_ms, next(self._numbers), event))

    def _catch_up(self, now_ms: int) -> None:
        while self._ahead and self._ahead[0][0] <= now_ms:
            self._happen(heapq.heappop(self._ahead)[2])

    def _happen(self, event: UserEvent) -> None:
        self.log.append(event)
        self.state.learn(event)

    def _arrive(self, count: int) -> None:
        known = len(self._readers)
        self._readers += [self.world.reader(known + number, seed=self._seed) for number in range(count)]

    def _announce(self, items: Sequence[Item], at_ms: int) -> None:
        self.state.announce(items, at_ms)
        self._open += [item.item_id for item in items]
