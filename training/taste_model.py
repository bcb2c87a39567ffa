"""What is known of tastes, learned from what users were shown and clicked. Pure.

Which tags are liked together, and by how much tastes differ, is the mean and the covariance of a normal distribution
from which every user's taste is drawn. They are found by expectation and maximisation (Dempster, Laird and Rubin 1977,
"Maximum likelihood from incomplete data via the EM algorithm"): each user's taste is inferred from all of their slates
under what is known so far, with Laplace's approximation, and what is known is fitted to the tastes inferred. So what
one user clicked explains itself by the tags they like, and tells of the others' tags only through the covariance.

Shapes: T tags, and with the level, which is how much a user clicks whatever the tags, C columns, the level last; E of
them that a user met; R items shown to a user.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tailrace.ids import UserId
from tailrace.tastes import NO_TAG, TasteModel
from training.examples import Example

Reals = NDArray[np.floating]

_ROUNDS = 20  # of expectation and maximisation; further ones change little
_FIRST_STEPS, _STEPS = 6, 2  # of Newton's method; from the second round on it starts from the last answer
_SPREAD = 0.5  # variance of what a tag is worth, in squared click logits, as long as nothing is known
_LEVEL_SPREAD, _LEAST_LEVEL_SPREAD = 0.1, 0.01  # the same of how much users click
_PRIOR_USERS = 2.0  # what was known before counts as so many users
_MOST_TAGS = 512  # that a model knows
_MOST_USERS, _MOST_SHOWN = 4000, 600  # whose slates are enough to learn a covariance, and of each the newest


@dataclass
class _History:
    """What one user was shown. The last column of `tags_RE` is 1: the level."""

    met_E: NDArray[np.int64]
    tags_RE: Reals
    clicked_R: NDArray[np.bool_]
    seen_R: Reals  # the chance that it was looked at
    taste_E: Reals  # the last answer


@dataclass
class _Known:
    mean_C: Reals
    covariance_CC: Reals


def fit_taste_model(examples: Sequence[Example], seen_K: Reals, parent: TasteModel) -> TasteModel | None:
    """Returns what is known of tastes after these examples, with a gain of 1, or None where nothing was clicked.

    It goes on from what the parent knows. `seen_K` is the chance that each place of a slate is looked at, the last
    standing for those after it (`training.examination`).
    """
    known_T = _choose_tags(examples, parent)
    histories = [_gather(own, seen_K, known_T) for own in _by_user(examples)]
    clicks = sum(int(history.clicked_R.sum()) for history in histories)
    shown = sum(len(history.clicked_R) for history in histories)
    if not 0 < clicks < shown:
        return None
    # 1. What was known before, and about how often anything is clicked.
    before = _before(parent, known_T, level=float(np.log(clicks / (shown - clicks))))
    known = before
    for history in histories:
        history.taste_E = known.mean_C[history.met_E]
    # 2. Tastes under what is known, and what is known from tastes.
    for number in range(_ROUNDS):
        known = _fit(histories, known, before, steps=_STEPS if number else _FIRST_STEPS)
    # 3. How often an item is clicked by one of whom nothing is known, and how much a showing tells of a tag: as much
    #    as of the item, of whose logit the tag has a share.
    usual = [h.seen_R @ _sigmoid(h.tags_RE @ known.mean_C[h.met_E]) for h in histories]
    rate = float(np.sum(usual)) / shown
    tags_RV = [history.tags_RE[:, :-1] for history in histories]
    weight = sum(float(tags.sum()) for tags in tags_RV) or 1.0
    information = rate * (1 - rate) * sum(float((tags**2).sum()) for tags in tags_RV) / weight
    return TasteModel(
        known_T,
        known.mean_C[:-1].astype(np.float32),
        known.covariance_CC[:-1, :-1].astype(np.float32),
        click_rate=rate,
        information=information,
        gain=1.0,
    )


def _choose_tags(examples: Sequence[Example], parent: TasteModel) -> NDArray[np.int16]:
    """Returns the buckets of the tags shown most often, and of those that the parent knows as far as there is room."""
    shown_V = np.zeros(NO_TAG + 1, dtype=np.int64)
    for example in examples:
        np.add.at(shown_V, example.tastes.tags_NK[: example.num_shown], 1)
    shown_V[parent.known_T] += 1
    most = np.argsort(-shown_V[:NO_TAG], kind="stable")[:_MOST_TAGS]
    return np.sort(most[shown_V[most] > 0]).astype(np.int16)


def _before(parent: TasteModel, known_T: NDArray[np.int16], level: float) -> _Known:
    mean_C, covariance_CC = np.zeros(len(known_T) + 1), np.eye(len(known_T) + 1) * _SPREAD
    _, here, there = np.intersect1d(known_T, parent.known_T, assume_unique=True, return_indices=True)
    mean_C[here] = parent.mean_T[there]
    covariance_CC[np.ix_(here, here)] = parent.covariance_TT[np.ix_(there, there)]
    mean_C[-1], covariance_CC[-1, -1] = level, _LEVEL_SPREAD
    return _Known(mean_C, covariance_CC)


def _fit(histories: Sequence[_History], known: _Known, before: _Known, *, steps: int) -> _Known:
    """One round. A user's taste is the mean plus covariance times a pull, so sums over the few tags met are enough."""
    pulls_C, excess_CC = np.zeros_like(known.mean_C), np.zeros_like(known.covariance_CC)
    for history in histories:
        met_E = history.met_E
        precision_EE = np.linalg.inv(known.covariance_CC[np.ix_(met_E, met_E)])
        history.taste_E, curve_EE = _infer(history, known.mean_C[met_E], precision_EE, steps)
        pull_E = precision_EE @ (history.taste_E - known.mean_C[met_E])
        # Twice: tastes differ from the mean by what is inferred of them, and by what remains unknown.
        told_EE = precision_EE @ np.linalg.solve(precision_EE + curve_EE, curve_EE)
        pulls_C[met_E] += pull_E
        excess_CC[np.ix_(met_E, met_E)] += np.outer(pull_E, pull_E) - told_EE
    users, told = len(histories), len(histories) + _PRIOR_USERS
    moved_C = known.covariance_CC @ pulls_C / users
    mean_C = (users * (known.mean_C + moved_C) + _PRIOR_USERS * before.mean_C) / told
    mean_C[-1] = known.mean_C[-1] + moved_C[-1]
    spread_CC = users * known.covariance_CC + known.covariance_CC @ excess_CC @ known.covariance_CC
    step_C = mean_C - known.mean_C
    spread_CC += users * (np.outer(step_C, step_C) - np.outer(step_C, moved_C) - np.outer(moved_C, step_C))
    covariance_CC = (spread_CC + _PRIOR_USERS * before.covariance_CC) / told
    # How much users click is no matter of tags.
    level_spread = max(float(spread_CC[-1, -1]) / users, _LEAST_LEVEL_SPREAD)
    covariance_CC[-1, :], covariance_CC[:, -1] = 0.0, 0.0
    covariance_CC[-1, -1] = level_spread
    return _Known(mean_C, (covariance_CC + covariance_CC.T) / 2)


def _infer(history: _History, mean_E: Reals, precision_EE: Reals, steps: int) -> tuple[Reals, Reals]:
    """Returns the most probable taste [E], and what the clicks add to its precision [E,E]."""
    tags_RE, clicked_R, seen_R, taste_E = history.tags_RE, history.clicked_R, history.seen_R, history.taste_E
    for _ in range(steps):
        chance_R = _sigmoid(tags_RE @ taste_E)
        missed_R = seen_R * chance_R * (1 - chance_R)
        slope_R = np.where(clicked_R, 1 - chance_R, -missed_R / (1 - seen_R * chance_R))
        # Curvature where it is sure to be positive, so that every step goes uphill.
        curve_EE = (tags_RE.T * np.where(clicked_R, chance_R * (1 - chance_R), missed_R)) @ tags_RE
        slope_E = tags_RE.T @ slope_R - precision_EE @ (taste_E - mean_E)
        taste_E = taste_E + np.linalg.solve(precision_EE + curve_EE, slope_E)
    return taste_E, curve_EE


def _by_user(examples: Sequence[Example]) -> list[list[Example]]:
    users: dict[UserId, list[Example]] = {}
    for example in examples:
        users.setdefault(example.user_id, []).append(example)
    drawn = np.random.default_rng(0).permutation(len(users))[:_MOST_USERS]
    found = list(users.values())
    return [found[index] for index in sorted(drawn.tolist())]


def _gather(examples: Sequence[Example], seen_K: Reals, known_T: NDArray[np.int16]) -> _History:
    tags_RK = np.concatenate([one.tastes.tags_NK[: one.num_shown] for one in examples])[-_MOST_SHOWN:]
    places_R = np.concatenate([np.arange(one.num_shown) for one in examples])[-_MOST_SHOWN:]
    clicked_R = np.concatenate([one.clicked_N[: one.num_shown] for one in examples])[-_MOST_SHOWN:]
    # An unknown tag counts among an item's tags, and for nothing else.
    columns_V = np.full(NO_TAG + 1, len(known_T), dtype=np.int64)
    columns_V[known_T] = np.arange(len(known_T))
    tags_RC = np.zeros((len(tags_RK), len(known_T) + 1))
    np.put_along_axis(tags_RC, columns_V[tags_RK], 1.0, axis=1)
    tags_RC /= np.sqrt(np.maximum((tags_RK != NO_TAG).sum(1, keepdims=True), 1.0))
    tags_RC[:, -1] = 1.0
    met_E = np.flatnonzero(tags_RC.any(0))
    seen_R = seen_K[np.minimum(places_R, len(seen_K) - 1)]
    return _History(met_E, tags_RC[:, met_E], clicked_R, seen_R, np.zeros(len(met_E)))


def _sigmoid(logits: Reals) -> Reals:
    result: Reals = 1 / (1 + np.exp(-np.clip(logits, -30.0, 30.0)))
    return result
