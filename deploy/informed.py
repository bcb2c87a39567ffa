"""What could be known of readers from the log: the arm of one who knows the world's laws, and of nobody what they like.

It sees the slates that were shown and what was clicked, no more than the recommender does, and infers each reader's
taste with the world's own click model: the most probable taste under a normal prior that has the mean and covariance
of tastes in this world. The oracle knows tastes; nobody can who has to learn them, so this arm says how much of the
oracle's lift was there to be learned. How good each item is, and how patient each reader, it takes to be average.

Shapes: I items, C themes that any taste has a part in, S items shown to a reader so far.
"""

from collections import defaultdict
from collections.abc import Collection, Sequence

import numpy as np

from tailrace.ids import ItemId, UserId
from tailrace.world import Floats, Moment, World

_DRAWN = 2000  # tastes that the prior is made of
_JITTER = 1e-4
_STEPS = 6  # of Newton's method; it starts from the last answer
_MOST_SHOWN = 600  # the newest; tastes drift


class Informed:
    """What is inferred of every reader, as the log grows."""

    def __init__(self, world: World, *, seed: int = 0) -> None:
        self._world = world
        rng = np.random.default_rng([seed, 555])
        tastes_DT = np.stack([world.draw_taste(rng) for _ in range(_DRAWN)])
        themes = np.flatnonzero(tastes_DT.any(0))
        self._slopes_IC: Floats = world.slopes_IT[:, themes]
        self._mean_C: Floats = tastes_DT[:, themes].mean(0)
        covariance_CC = np.cov(tastes_DT[:, themes].T) + _JITTER * np.eye(len(themes))
        self._precision_CC: Floats = np.linalg.inv(covariance_CC)
        self._shown: dict[UserId, list[tuple[int, float]]] = defaultdict(list)
        self._clicked: dict[UserId, list[bool]] = defaultdict(list)
        self._taste: dict[UserId, Floats] = {}

    def learn(self, user_id: UserId, slate: Sequence[ItemId], clicked: Collection[ItemId]) -> None:
        """Takes note of a slate and what was clicked on it."""
        examined = self._world.usual_examination(len(slate))
        self._shown[user_id] += zip(self._world.rows(slate).tolist(), examined.tolist(), strict=True)
        self._clicked[user_id] += [item_id in clicked for item_id in slate]
        del self._shown[user_id][:-_MOST_SHOWN], self._clicked[user_id][:-_MOST_SHOWN]
        self._taste.pop(user_id, None)

    def slate(self, user_id: UserId, moment: Moment, n: int, among: Sequence[ItemId]) -> list[ItemId]:
        """Returns the slate of `n` that seems best for the reader."""
        logits_I = self._world.usual_logits(moment) + self._slopes_IC @ self._infer(user_id)
        rows = self._world.rows(among)
        return [among[index] for index in np.argsort(-logits_I[rows], kind="stable")[:n]]

    def _infer(self, user_id: UserId) -> Floats:
        """Returns float64 [C]: the most probable taste."""
        if user_id not in self._taste:
            self._taste[user_id] = self._maximise(self._shown[user_id], self._clicked[user_id])
        return self._taste[user_id]

    def _maximise(self, shown: Sequence[tuple[int, float]], clicked: Sequence[bool]) -> Floats:
        taste_C = self._mean_C
        if not shown:
            return taste_C
        slopes_SC = self._slopes_IC[[row for row, _ in shown]]
        examined_S = np.array([examined for _, examined in shown])
        clicked_S = np.array(clicked)
        base_S = self._world.usual_logits(None)[[row for row, _ in shown]]
        for _ in range(_STEPS):
            chance_S = 1 / (1 + np.exp(-(base_S + slopes_SC @ taste_C)))
            unclicked_S = 1 - examined_S * self._world.most * chance_S
            missed_S = examined_S * self._world.most * chance_S * (1 - chance_S)
            slope_S = np.where(clicked_S, 1 - chance_S, -missed_S / unclicked_S)
            # Curvature where it is sure to be positive, so that every step goes uphill.
            curve_S = np.where(clicked_S, chance_S * (1 - chance_S), missed_S)
            hessian_CC = (slopes_SC * curve_S[:, None]).T @ slopes_SC + self._precision_CC
            gradient_C = slopes_SC.T @ slope_S - self._precision_CC @ (taste_C - self._mean_C)
            taste_C = taste_C + np.linalg.solve(hessian_CC, gradient_C)
        return taste_C
