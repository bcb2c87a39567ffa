"""What is known of tastes, learned from what users were shown and clicked. Pure.

Which tags are liked together, and by how much tastes differ, is the mean and the covariance of a normal distribution
from which every user's taste is drawn. They are found by expectation and maximisation (Dempster, Laird and Rubin 1977,
"Maximum likelihood from incomplete data via the EM algorithm"): each user's taste is inferred from all of their slates
under what is known so far, with Laplace's approximation, and what is known is fitted to the tastes inferred. So what
one user clicked explains itself by the tags they like, and tells of the others' tags only through the covariance.

Shapes: T tags, and with the level, which is how much a user clicks whatever the tags, C columns, the level last; E of
them that a user met; R items shown to a user. All reals are float64.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tailrace.ids import UserId
from tailrace.tastes import NO_TAG, TasteModel
from training.examination import places_seen
from training.examples import Example

Reals = NDArray[np.floating]

_ROUNDS = 8  # of expectation and maximisation at most: twenty rank no better, and the next fit goes on from here
_SETTLED = 0.01  # part of the covariance by which a round may change it, and none follows
_STEPS, _HALVINGS = 8, 6  # of Newton's method, and of a step that leads downhill
_NEAR = 1e-3  # in logits: a step so small is the last
_SPREAD = 0.5  # variance of what a tag is worth, in squared click logits, as long as nothing is known
_LEVEL_SPREAD, _LEAST_LEVEL_SPREAD = 0.1, 0.01  # the same of how much users click
_PRIOR_USERS = 2.0  # what was known before counts as so many users
_MOST_TAGS = 512  # that a model knows
_MOST_SHOWN, _MOST_ROWS = 600, 300_000  # items shown to a user, the newest, and to all together: seconds of work


@dataclass
class _History:
    """What one user was shown. The last column of `tags_RE` is 1: the level."""

    met_E: NDArray[np.int64]
    tags_RE: Reals
    clicked_R: NDArray[np.bool_]
    seen_R: Reals  # the chance that it was looked at
    taste_E: Reals  # the last answer


@dataclass(frozen=True)
class _Known:
    mean_C: Reals
    covariance_CC: Reals


def fit_taste_model(examples: Sequence[Example], seen_K: NDArray[np.float64], parent: TasteModel) -> TasteModel | None:
    """Returns what is known of tastes after these examples, with a gain of 1.

    It goes on from what the parent knows. `seen_K` is the chance that each place of a slate is looked at, the last
    standing for those after it (`training.examination`). Returns None where all or nothing was clicked, which tells
    nothing, or where no finite answer was found.
    """
    known_T = _choose_tags(examples, parent)
    histories = [_gather(own, seen_K, known_T) for own in _choose_users(examples)]
    clicks = sum(int(history.clicked_R.sum()) for history in histories)
    shown = sum(len(history.clicked_R) for history in histories)
    if not 0 < clicks < shown:
        return None
    # 1. What was known before, and about how often anything is clicked.
    before = known = _before(parent, known_T, level=float(np.log(clicks / (shown - clicks))))
    for history in histories:
        history.taste_E = known.mean_C[history.met_E]
    # 2. Tastes under what is known, and what is known from tastes.
    for _ in range(_ROUNDS):
        last, known = known, _fit(histories, known, before)
        if np.linalg.norm(known.covariance_CC - last.covariance_CC) < _SETTLED * np.linalg.norm(known.covariance_CC):
            break
    if not (np.isfinite(known.covariance_CC).all() and np.isfinite(known.mean_C).all()):
        return None
    # 3. What clicks and showings of each tag say of it, to whoever knows them no closer.
    rate_T, information_T, together_TT = _sight(histories, known, len(known_T))
    return TasteModel(
        known_T,
        known.mean_C[:-1].astype(np.float32),
        known.covariance_CC[:-1, :-1].astype(np.float32),
        rate_T.astype(np.float32),
        information_T.astype(np.float32),
        together_TT.astype(np.float32),
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


def _fit(histories: Sequence[_History], known: _Known, before: _Known) -> _Known:
    """One round. A user's taste is the mean plus covariance times a pull, so sums over the few tags met are enough."""
    mean_C, covariance_CC = known.mean_C, known.covariance_CC
    pulls_C, excess_CC = np.zeros_like(mean_C), np.zeros_like(covariance_CC)
    for history in histories:
        met_E = history.met_E
        precision_EE = np.linalg.inv(covariance_CC[np.ix_(met_E, met_E)])
        history.taste_E = _infer(history, mean_C[met_E], precision_EE)
        curve_EE = _curve(history)
        pull_E = precision_EE @ (history.taste_E - mean_C[met_E])
        told_EE = precision_EE @ np.linalg.solve(precision_EE + curve_EE, curve_EE)
        pulls_C[met_E] += pull_E
        excess_CC[np.ix_(met_E, met_E)] += np.outer(pull_E, pull_E) - told_EE
    # Tastes differ from the mean by what is inferred of them, and by what remains unknown after that was told.
    users, all_users = len(histories), len(histories) + _PRIOR_USERS
    moved_C = covariance_CC @ pulls_C / users
    found_C = (users * (mean_C + moved_C) + _PRIOR_USERS * before.mean_C) / all_users
    found_C[-1] = mean_C[-1] + moved_C[-1]
    step_C = found_C - mean_C
    spread_CC = users * covariance_CC + covariance_CC @ excess_CC @ covariance_CC
    spread_CC += users * (np.outer(step_C, step_C) - np.outer(step_C, moved_C) - np.outer(moved_C, step_C))
    found_CC = (spread_CC + _PRIOR_USERS * before.covariance_CC) / all_users
    # How much users click is no matter of tags.
    found_CC[-1, :], found_CC[:, -1] = 0.0, 0.0
    found_CC[-1, -1] = max(float(spread_CC[-1, -1]) / users, _LEAST_LEVEL_SPREAD)
    return _Known(found_C, (found_CC + found_CC.T) / 2)


def _infer(history: _History, mean_E: Reals, precision_EE: Reals) -> Reals:
    """Returns the most probable taste [E], by Newton's method from the last answer."""

    def log_probability(taste_E: Reals) -> float:
        seen_clicks_R = history.seen_R * _sigmoid(history.tags_RE @ taste_E)
        likelihood = np.log(np.where(history.clicked_R, seen_clicks_R, 1 - seen_clicks_R)).sum()
        return float(likelihood - (taste_E - mean_E) @ precision_EE @ (taste_E - mean_E) / 2)

    taste_E = history.taste_E
    reached = log_probability(taste_E)
    for _ in range(_STEPS):
        chance_R = _sigmoid(history.tags_RE @ taste_E)
        missed_R = history.seen_R * chance_R * (1 - chance_R) / (1 - history.seen_R * chance_R)
        slope_R = np.where(history.clicked_R, 1 - chance_R, -missed_R)
        slope_E = history.tags_RE.T @ slope_R - precision_EE @ (taste_E - mean_E)
        step_E = np.linalg.solve(precision_EE + _curve(history, taste_E), slope_E)
        # Uphill in direction, but not always so far: of somebody who clicks everything the curve says too little.
        for _ in range(_HALVINGS):
            found = log_probability(taste_E + step_E)
            if found >= reached:
                taste_E, reached = taste_E + step_E, found
                break
            step_E = step_E / 2
        else:
            break
        if np.abs(step_E).max() < _NEAR:
            break
    return taste_E


def _curve(history: _History, taste_E: Reals | None = None) -> Reals:
    """Returns what the clicks add to the precision of a taste [E,E]: curvature where it is sure to be positive."""
    chance_R = _sigmoid(history.tags_RE @ (history.taste_E if taste_E is None else taste_E))
    weight_R = np.where(history.clicked_R, 1.0, history.seen_R) * chance_R * (1 - chance_R)
    result: Reals = (history.tags_RE.T * weight_R) @ history.tags_RE
    return result


def _sight(histories: Sequence[_History], known: _Known, tags: int) -> tuple[Reals, Reals, Reals]:
    """Returns by tag how much is clicked of what is shown of it by somebody of whom nothing is known, and what a
    showing tells of its worth; and how much of that is told of two tags at once, as a correlation [T,T].
    """
    shown_T, clicked_T, told_TT = np.zeros(tags), np.zeros(tags), np.zeros((tags, tags))
    for history in histories:
        met_E, tags_RE = history.met_E[:-1], history.tags_RE[:, :-1]
        chance_R = history.seen_R * _sigmoid(history.tags_RE @ known.mean_C[history.met_E])
        shown_T[met_E] += tags_RE.sum(0)
        clicked_T[met_E] += chance_R @ tags_RE
        told_TT[np.ix_(met_E, met_E)] += (tags_RE.T * (chance_R * (1 - chance_R))) @ tags_RE
    told_T = np.diag(told_TT)
    usual = clicked_T.sum() / max(shown_T.sum(), 1e-9), told_T.sum() / max(shown_T.sum(), 1e-9)
    never_T = shown_T == 0  # known from the parent alone
    rate_T = np.where(never_T, usual[0], clicked_T / np.where(never_T, 1.0, shown_T))
    information_T = np.where(never_T, usual[1], told_T / np.where(never_T, 1.0, shown_T))
    root_T = np.sqrt(np.where(never_T, 1.0, told_T))
    # Half of it: slates are made for their users, so that tags stand together the more for being liked together.
    together_TT = told_TT / np.outer(root_T, root_T) / 2
    np.fill_diagonal(together_TT, 1.0)
    return rate_T, information_T, together_TT


def _choose_users(examples: Sequence[Example]) -> list[list[Example]]:
    """Returns each user's examples, in time order; of more than there is room for those users who were shown most."""
    users: dict[UserId, list[Example]] = {}
    for example in sorted(examples, key=lambda one: one.at_ms):
        users.setdefault(example.user_id, []).append(example)
    shown = {user_id: min(sum(one.num_shown for one in own), _MOST_SHOWN) for user_id, own in users.items()}
    order = sorted(users, key=lambda user_id: (-shown[user_id], user_id))
    room = int(np.searchsorted(np.cumsum([shown[user_id] for user_id in order]), _MOST_ROWS, side="right"))
    return [users[user_id] for user_id in order[: max(room, 1)]]


def _gather(examples: Sequence[Example], seen_K: NDArray[np.float64], known_T: NDArray[np.int16]) -> _History:
    tags_RK = np.concatenate([one.tastes.tags_NK[: one.num_shown] for one in examples])[-_MOST_SHOWN:]
    seen_R = np.concatenate([places_seen(one, seen_K) for one in examples])[-_MOST_SHOWN:]
    clicked_R = np.concatenate([one.clicked_N[: one.num_shown] for one in examples])[-_MOST_SHOWN:]
    # An unknown tag counts among an item's tags, and for nothing else.
    columns_V = np.full(NO_TAG + 1, len(known_T), dtype=np.int64)
    columns_V[known_T] = np.arange(len(known_T))
    tags_RC = np.zeros((len(tags_RK), len(known_T) + 1))
    np.put_along_axis(tags_RC, columns_V[tags_RK], 1.0, axis=1)
    tags_RC /= np.sqrt(np.maximum((tags_RK != NO_TAG).sum(1, keepdims=True), 1.0))
    tags_RC[:, -1] = 1.0
    met_E = np.flatnonzero(tags_RC.any(0))
    # Never sure, so that a click at a place that nobody looks at and a miss at one that all do have a chance.
    seen_R = np.clip(seen_R, 1e-3, 1 - 1e-6)
    return _History(met_E, tags_RC[:, met_E], clicked_R, seen_R, np.zeros(len(met_E)))


def _sigmoid(logits: Reals) -> Reals:
    result: Reals = 1 / (1 + np.exp(-np.clip(logits, -30.0, 30.0)))
    return result
