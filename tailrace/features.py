"""The numbers a model sees beside text and tastes: the one maker of late features, for ranking and for the log. Pure.

Numbers are fresh: item counters decayed to now, ages, last touches, what the user did a moment ago. The key ones stand
also as their rank within the pool of candidates, because what is much depends on what else there is.

Shapes: N candidates, F features.
"""

import base64
import hashlib
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from tailrace.catalogue import Catalogue, ItemRows, Rows
from tailrace.cosines import Cosines, Floats
from tailrace.counter_columns import NEVER_MS
from tailrace.counters import KINDS
from tailrace.errors import InvalidRecord
from tailrace.events import Context
from tailrace.neighbours import COVISIT_NAMES, OVERLAP_NAMES, covisit_columns, overlap_columns
from tailrace.profile import Profile
from tailrace.responses import TOPIC_NAMES, Responses, gather_responses, topic_columns
from tailrace.text import TEXT_VERSION, is_mobile, local_time, now_interests

Column = NDArray[np.floating] | float

FEATURE_VERSION = 4
NEUTRAL_RATING = 3.0  # a predicted rating in the middle moves nothing
HALF_LIFE_NAMES = ("15m", "1h", "6h", "24h", "7d")
HEAT_KINDS = ("users", "rated_up")
HEAT_FLOOR = 0.05  # heat is log(1 + sum / floor): tells a faint trace from none at all, where log1p sees only zeros

_RATES = (  # name, numerator, denominator, Beta prior (expected share, weight)
    ("click_rate", "clicked", "shown", 0.05, 20.0),
    ("like_rate", "liked", "clicked", 0.1, 10.0),
    ("skip_rate", "skipped", "shown", 0.02, 20.0),
    ("praise_rate", "rated_up", "rated", 0.5, 5.0),
)
_RATE_HALF_LIVES = ("1h", "24h", "7d")
_RANKED = (
    "log_users_15m",
    "log_users_1h",
    "log_users_6h",
    "log_users_24h",
    "log_clicked_1h",
    "newness",
    "cos_user",
    "cos_query",
    "cos_history",
)
_VISIT_NAMES = (
    "newer_than_visit",
    "touched_since_visit",
    "touches_since_visit",
    "users_since_visit",
    "age_to_visit",
    "touch_to_visit",
)
_LONGEST_S = 90 * 86_400.0
_VISIT_GAP_MS = 30 * 60_000
_LIMIT = 1e4


def _feature_names() -> tuple[str, ...]:
    names = [f"log_{kind}_{half_life}" for kind in KINDS for half_life in HALF_LIFE_NAMES]
    names += [f"heat_{kind}_{half_life}" for kind in HEAT_KINDS for half_life in HALF_LIFE_NAMES]
    names += [f"{rate[0]}_{half_life}" for rate in _RATES for half_life in _RATE_HALF_LIVES]
    names += ["log_age", "rsqrt_age", "newness"]
    names += [f"log_since_touch_{number}" for number in (1, 2, 3, 4)]
    names += ["cos_user", "cos_query", "cos_history", "cos_recent"]
    names += [f"rank_{name}" for name in _RANKED]
    names += [*TOPIC_NAMES, *COVISIT_NAMES, *OVERLAP_NAMES, "shown_to_user", "log_since_shown", "touched_by_user"]
    names += [*_VISIT_NAMES, "visit_idle"]
    names += ["user_events", "user_idle", "user_day", "user_interests", "user_known"]
    names += ["query_given", "hour_sin", "hour_cos", "weekend", "mobile"]
    return tuple(names)


def hash_features(names: Sequence[str]) -> str:
    """Returns 16 hex digits that stand for these features, in this order, and for how they and the texts are made."""
    made_of = (*names, f"features {FEATURE_VERSION}", f"text {TEXT_VERSION}")
    return hashlib.sha256("\n".join(made_of).encode()).hexdigest()[:16]


FEATURE_NAMES: tuple[str, ...] = _feature_names()
FEATURE_NAMES_HASH: str = hash_features(FEATURE_NAMES)

# Version 0 of the model is this sum and nothing else (`training.head.Head`): learning starts from it. Read it as
# log(popularity of the last hours) - log(age) / 2, plus taste. Chosen on Deskdrop's third quarter, which fixes the
# counters and how much an untrained cosine may weigh, and in `tailrace.world`, which fixes taste against popularity.
PRIOR_WEIGHTS: Mapping[str, float] = {
    "heat_users_1h": 0.5,
    "heat_users_6h": 0.25,
    "heat_rated_up_6h": 0.15,
    "heat_rated_up_24h": 0.15,
    "newness": 0.5,
    "covisit": 0.5,
    "cos_user": 2.0,
    "cos_history": 4.0,
    "cos_query": 60.0,  # a query says outright what is wanted: more than all the rest together
    "tag_affinity": 6.0,
    "entity_affinity": 2.0,
    "tag_response": 28.0,  # what was passed over as well as clicked: where it is known, nothing tells more
    "entity_response": 3.5,
    "shown_to_user": -0.5,
    "touched_by_user": -3.0,
}


def compute_features(
    catalogue: Catalogue,
    rows_N: Rows,
    profile: Profile,
    context: Context | None,
    query_given: bool,
    cosines: Cosines,
    now_ms: int,
    responses: Responses | None = None,
) -> Floats:
    """Returns float32 [N, F] in the order of FEATURE_NAMES, finite whatever the state.

    `rows_N` are the whole pool, since ranks are within it. `context` is the one that holds now, or None. `responses`
    are those of the profile, where they have been gathered already.
    """
    # 1. One consistent copy of the rows, then columns by name, cheap and independent of each other.
    held = catalogue.gather(rows_N, now_ms)
    columns: dict[str, Column] = {}
    columns |= _counter_columns(held.sums_NKH)
    columns |= _time_columns(held, profile, now_ms)
    columns |= {
        "cos_user": cosines.user_N,
        "cos_query": cosines.query_N,
        "cos_history": cosines.history_N,
        "cos_recent": cosines.recent_N,
    }
    interests = now_interests(profile, now_ms)
    responses = responses or gather_responses(profile, catalogue.topics, now_ms)
    columns |= topic_columns(catalogue.split_topics_at(rows_N.tolist()), interests, responses)
    columns |= covisit_columns(catalogue, rows_N, held, profile, now_ms)
    columns |= overlap_columns(catalogue, held, profile, now_ms)
    columns |= _fatigue_columns(catalogue, rows_N, profile, now_ms)
    columns |= _user_columns(profile, interests, context, query_given, now_ms)
    # 2. Ranks within the pool.
    columns |= {f"rank_{name}": pool_ranks(np.asarray(columns[name])) for name in _RANKED}
    # 3. One array, in order.
    features_NF = np.empty((len(rows_N), len(FEATURE_NAMES)), dtype=np.float32)
    for index, name in enumerate(FEATURE_NAMES):
        features_NF[:, index] = columns[name]
    np.nan_to_num(features_NF, copy=False, nan=0.0, posinf=_LIMIT, neginf=-_LIMIT)
    return np.clip(features_NF, -_LIMIT, _LIMIT, out=features_NF)


def prior_scores(features_NF: Floats) -> Floats:
    """Returns float32 [N]: what version 0 of the model scores, without a model. Also the lowest rung that ranks."""
    result: Floats = features_NF @ _PRIOR_F
    return result


def utilities(clicks_N: Floats, ratings_N: Floats, rating_weight: float) -> Floats:
    """Returns float32 [N]: what orders a slate, from click logits and predicted ratings (1 to 5)."""
    result: Floats = clicks_N + rating_weight * (ratings_N - NEUTRAL_RATING)
    return result


def pool_ranks(values_N: NDArray[np.floating]) -> Floats:
    """Returns float32 [N]: each value's rank within the pool, 0 for the least, 1 for the most, ties averaged.

    >>> pool_ranks(np.array([3.0, 1.0, 3.0])).tolist()
    [0.75, 0.0, 0.75]
    """
    if len(values_N) < 2:
        return np.full(len(values_N), 0.5, dtype=np.float32)
    ordered = np.sort(values_N)
    least, most = np.searchsorted(ordered, values_N, "left"), np.searchsorted(ordered, values_N, "right") - 1
    return ((least + most) / (2 * (len(values_N) - 1))).astype(np.float32)


def encode_features(features_F: Floats) -> str:
    """Returns one candidate's features as an impression carries them: base64 of little-endian float32."""
    return base64.b64encode(features_F.astype("<f4").tobytes()).decode()


def decode_features(text: str) -> Floats:
    """Returns float32 [F], exactly what was encoded. Raises InvalidRecord where it is not whole float32 numbers."""
    try:
        return np.frombuffer(base64.b64decode(text, validate=True), dtype="<f4").astype(np.float32)
    except ValueError as error:
        raise InvalidRecord(f"not base64 of float32: {error}", field="$.features") from error


def _counter_columns(sums_NKH: Floats) -> dict[str, Column]:
    columns: dict[str, Column] = {}
    logs_NKH = np.log1p(sums_NKH)
    for kind_index, kind in enumerate(KINDS):
        for index, half_life in enumerate(HALF_LIFE_NAMES):
            columns[f"log_{kind}_{half_life}"] = logs_NKH[:, kind_index, index]
    for kind in HEAT_KINDS:
        heat_NH = np.log1p(sums_NKH[:, KINDS.index(kind)] / HEAT_FLOOR)
        columns |= {f"heat_{kind}_{name}": heat_NH[:, index] for index, name in enumerate(HALF_LIFE_NAMES)}
    for rate, kind, of, share, weight in _RATES:
        for half_life in _RATE_HALF_LIVES:
            index = HALF_LIFE_NAMES.index(half_life)
            happened_N, chances_N = sums_NKH[:, KINDS.index(kind), index], sums_NKH[:, KINDS.index(of), index]
            smoothed_N = (happened_N + share * weight) / (chances_N + weight)
            columns[f"{rate}_{half_life}"] = np.minimum(smoothed_N, 1.0)
    return columns


def _time_columns(held: ItemRows, profile: Profile, now_ms: int) -> dict[str, Column]:
    age_s_N = np.maximum(now_ms - held.created_ms_N, 0) / 1000
    since_s_NT = np.clip((now_ms - held.touches_ms_NT[:, :4]) / 1000, 0.0, _LONGEST_S)
    visit_ms = last_visit_ms(profile, now_ms)
    columns: dict[str, Column] = _visit_columns(held, age_s_N, since_s_NT[:, 0], visit_ms, now_ms) | {
        "log_age": np.log1p(age_s_N / 3600),
        "rsqrt_age": 1 / np.sqrt(1 + age_s_N / 3600),
        # In steps of 5 %: items announced together are equally new, and so tie in rank.
        "newness": -np.round(np.log1p(age_s_N / 60) * 20) / 20,
    }
    return columns | {f"log_since_touch_{index + 1}": np.log1p(since_s_NT[:, index] / 60) for index in range(4)}


def _visit_columns(
    held: ItemRows, age_s_N: NDArray[np.floating], since_s_N: NDArray[np.floating], visit_ms: int | None, now_ms: int
) -> dict[str, Column]:
    """What is new to somebody who was last here then: zeros for whoever never was."""
    if visit_ms is None:
        never: dict[str, Column] = dict.fromkeys(_VISIT_NAMES, 0.0)
        return never | {"visit_idle": float(np.log1p(_LONGEST_S / 3600))}
    away_s = min(max(now_ms - visit_ms, 0) / 1000, _LONGEST_S)
    return {
        "newer_than_visit": (held.created_ms_N > visit_ms).astype(np.float32),
        "touched_since_visit": (held.touches_ms_NT[:, 0] > visit_ms).astype(np.float32),
        "touches_since_visit": np.log1p((held.touches_ms_NT > visit_ms).sum(1)),
        "users_since_visit": np.log1p((held.visits_ms_NV > visit_ms).sum(1)),
        # Logs of shares: how old the item, and its last touch, are in times of the user's absence.
        "age_to_visit": np.log1p(age_s_N / 60) - np.log1p(away_s / 60),
        "touch_to_visit": np.log1p(since_s_N / 60) - np.log1p(away_s / 60),
        "visit_idle": float(np.log1p(away_s / 3600)),
    }


def last_visit_ms(profile: Profile, now_ms: int) -> int | None:
    """Returns when the visit before this one ended: the newest touch that a gap of half an hour follows, or None."""
    later_ms = now_ms
    for touch in reversed(profile.recent):
        if later_ms - touch.at_ms >= _VISIT_GAP_MS:
            return touch.at_ms
        later_ms = min(later_ms, touch.at_ms)
    return None


def _fatigue_columns(catalogue: Catalogue, rows_N: Rows, profile: Profile, now_ms: int) -> dict[str, Column]:
    shown, clicked, rated = profile.impressions.seen, profile.clicks.seen, profile.ratings.seen
    times_N = np.zeros(len(rows_N))
    at_ms_N = np.full(len(rows_N), NEVER_MS, dtype=np.int64)
    touched_N = np.zeros(len(rows_N))
    for index, item in enumerate(catalogue.items_at(rows_N.tolist())):
        if item is not None:
            item_id = item.item_id
            if item_id in shown:
                at_ms_N[index], times_N[index] = shown[item_id]
            touched_N[index] = item_id in clicked or item_id in rated
    since_s_N = np.clip((now_ms - at_ms_N) / 1000, 0.0, _LONGEST_S)
    return {
        "shown_to_user": np.log1p(times_N),
        "log_since_shown": np.log1p(since_s_N / 60),
        "touched_by_user": touched_N,
    }


def _user_columns(
    profile: Profile, interests: Mapping[str, float], context: Context | None, query_given: bool, now_ms: int
) -> dict[str, Column]:
    local = local_time(context, now_ms)
    angle = 2 * np.pi * (local.hour + local.minute / 60) / 24
    idle_s = _LONGEST_S if profile.last_at_ms is None else min(max(now_ms - profile.last_at_ms, 0) / 1000, _LONGEST_S)
    day = sum(now_ms - touch.at_ms <= 86_400_000 for touch in profile.recent)
    return {
        "user_events": float(np.log1p(profile.events)),
        "user_idle": float(np.log1p(idle_s / 3600)),
        "user_day": float(np.log1p(day)),
        "user_interests": float(np.log1p(sum(abs(weight) for weight in interests.values()))),
        "user_known": float(bool(profile.recent)),
        "query_given": float(query_given),
        "hour_sin": float(np.sin(angle)),
        "hour_cos": float(np.cos(angle)),
        "weekend": float(local.weekday() >= 5),
        "mobile": float(is_mobile(context)),
    }


_PRIOR_F: Floats = np.array([PRIOR_WEIGHTS.get(name, 0.0) for name in FEATURE_NAMES], dtype=np.float32)
