"""Which items are considered for an answer: a few hundred rows of the catalogue, from several sources. Pure.

Filters come first, over the whole catalogue, so that every source draws from what may be shown and a strict filter
leaves a full pool. What was removed is counted by reason. A source that has nothing to offer is left out.

Shapes: R rows of the catalogue, N candidates, D vector size.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from services.filters import Filters, fitting
from tailrace.catalogue import Catalogue, Flags, Rows
from tailrace.ids import ItemId
from tailrace.items import TAG
from tailrace.profile import Profile
from tailrace.tastes import sum_worth

Vector = NDArray[np.floating]
Source = Literal["caller", "query", "user", "history", "trending", "fresh", "covisited", "interests", "cold"]

# Shares of the pool, among the sources that are asked. What one does not use goes to the others in turn.
_SHARES: Mapping[Source, float] = {
    "query": 0.5,
    "user": 0.15,
    "history": 0.15,
    "trending": 0.25,
    "fresh": 0.2,
    "covisited": 0.1,
    "interests": 0.2,
    "cold": 0.03,
}
_TREND_HALF_LIVES = (1, 2, 3, 4)  # 1 h, 6 h, 24 h, 7 d


@dataclass(frozen=True)
class PoolRequest:
    """What one request asks of the pool. Vectors are [D]; None where there is no such vector.

    `pulls` is what each topic adds to a click logit of this user (`tailrace.responses.topic_pulls`), and `tag_worth_V`
    what a model has learned that tags add (`tailrace.tastes.TasteModel`): by bucket, of all tags there are. Either is
    divided by the root of how many tags, or entities, an item has.
    """

    profile: Profile
    now_ms: int
    num_candidates: int
    user_D: Vector | None = None
    query_D: Vector | None = None
    history_D: Vector | None = None
    candidates: Sequence[ItemId] | None = None
    exclude: Collection[ItemId] = ()
    filters: Filters = field(default_factory=Filters)
    keep_seen: bool = False
    pulls: Mapping[str, float] = field(default_factory=dict)
    tag_worth_V: Vector | None = None


@dataclass(frozen=True)
class Candidates:
    """The pool, the source that named each first, and what did not make it.

    `removed` counts items of the catalogue, or of the caller's list, by reason: unknown, seen, hidden, excluded,
    filtered.
    `empty` lists the sources that were asked and had nothing.
    """

    rows_N: Rows
    sources_N: list[Source]
    removed: dict[str, int]
    empty: list[Source]


def build_pool(catalogue: Catalogue, vectors_RD: Vector, request: PoolRequest, rng: np.random.Generator) -> Candidates:
    """Returns at most `num_candidates` distinct candidates, or those of the caller's own list that may be shown.

    `vectors_RD` are the loaded model's item vectors by catalogue row, float32 and of unit length, zeros where an item
    is not encoded yet; it may have fewer rows than the catalogue or more.
    """
    # 1. What may be shown at all, and why the rest may not.
    allowed_R, removed = _allowed(catalogue, request)
    # 2. The caller's own list needs no sources, and keeps its order.
    if request.candidates is not None:
        rows = catalogue.rows(dict.fromkeys(request.candidates))
        rows = rows[rows < len(allowed_R)]
        rows = rows[allowed_R[rows]]
        return Candidates(rows, ["caller"] * len(rows), removed, [])
    # 3. Each source ranks what it would offer, best first.
    offers = _offers(catalogue, vectors_RD, request, allowed_R, rng)
    empty = [source for source, rows in offers.items() if not len(rows)]
    # 4. Quotas first, then the rest in turn; whoever names an item first is its source.
    named = _merge(offers, request.num_candidates)
    return Candidates(np.array(list(named), dtype=np.int64), list(named.values()), removed, empty)


def allowed_rows(catalogue: Catalogue, request: PoolRequest) -> Rows:
    """Returns int64, ascending: every row that filters, exclusions and what the user has seen leave."""
    return np.flatnonzero(_allowed(catalogue, request)[0])


def nearest(vectors_RD: Vector, wanted_D: Vector, allowed_R: Flags, limit: int) -> Rows:
    """Returns the allowed rows that have a vector, nearest to `wanted_D` first; none where that is not finite.

    A cosine of exactly 0 stands for a row without a vector.
    """
    size = min(len(vectors_RD), len(allowed_R))
    if not np.isfinite(wanted_D).all():
        return np.empty(0, dtype=np.int64)
    near_R = vectors_RD[:size].astype(np.float32, copy=False) @ wanted_D.astype(np.float32)
    return _top(near_R, allowed_R[:size] & (near_R != 0), limit)


def trending(catalogue: Catalogue, allowed_R: Flags, now_ms: int, limit: int) -> Rows:
    """Returns the allowed rows with the most users of late: the lists of 1 h, 6 h, 24 h and 7 d, taken in turn.

    Where nobody clicks but people rate, praise counts instead.
    """
    size = len(allowed_R)
    lists = []
    for half_life in _TREND_HALF_LIVES:
        users_R = catalogue.trend("users", half_life, now_ms)[:size]
        heat_R = users_R + catalogue.trend("rated_up", half_life, now_ms)[:size]
        lists.append(_top(heat_R, allowed_R & (heat_R > 0), limit))
    return _in_turn(lists)[:limit]


def fresh(catalogue: Catalogue, allowed_R: Flags, limit: int) -> Rows:
    """Returns the allowed rows that became available last, newest first."""
    return _top(catalogue.created_ms()[: len(allowed_R)].astype(np.float64), allowed_R, limit)


def covisited(catalogue: Catalogue, profile: Profile, allowed_R: Flags, now_ms: int, limit: int) -> Rows:
    """Returns the allowed rows that others touched close to this user's last items, strongest first."""
    weights: dict[ItemId, float] = {}
    for item_id in profile.clicks.last_items:
        for other, weight in catalogue.covisits(item_id, now_ms).items():
            weights[other] = weights.get(other, 0.0) + weight
    rows = catalogue.rows(sorted(weights, key=lambda item_id: (-weights[item_id], item_id)))
    rows = rows[rows < len(allowed_R)]
    return rows[allowed_R[rows]][:limit]


def of_interest(
    catalogue: Catalogue, pulls: Mapping[str, float], tag_worth_V: Vector | None, allowed_R: Flags, limit: int
) -> Rows:
    """Returns the allowed rows whose tags and entities draw the user most, best first; see `PoolRequest`."""
    size = len(allowed_R)
    pulled_R2 = np.zeros((size, 2))
    for topic, pull in pulls.items():
        pulled_R2[_below(catalogue.topic_rows(topic), size), 0 if topic.startswith(TAG) else 1] += pull
    score_R = (pulled_R2 / catalogue.topic_roots()[:size]).sum(1)
    if tag_worth_V is not None:
        score_R[allowed_R] += sum_worth(tag_worth_V, catalogue.tags()[:size][allowed_R])
    return _top(score_R, allowed_R & (score_R > 0), limit)


def cold(catalogue: Catalogue, allowed_R: Flags, now_ms: int, limit: int, rng: np.random.Generator) -> Rows:
    """Returns allowed rows drawn at random from those hardly shown and hardly touched by anyone."""
    size, week = len(allowed_R), _TREND_HALF_LIVES[-1]
    known_R = catalogue.trend("shown", week, now_ms)[:size] + catalogue.trend("users", week, now_ms)[:size]
    rows = np.flatnonzero(allowed_R & (known_R < 0.5))
    return rng.permutation(rows)[:limit]


def _allowed(catalogue: Catalogue, request: PoolRequest) -> tuple[Flags, dict[str, int]]:
    profile, filters = request.profile, request.filters
    allowed_R = np.zeros(catalogue.num_rows, dtype=np.bool_)
    removed: dict[str, int] = {}
    if request.candidates is None:
        allowed_R[_below(catalogue.live_rows(), len(allowed_R))] = True
    else:
        asked = set(request.candidates)
        rows = _below(catalogue.rows(asked), len(allowed_R))
        allowed_R[rows] = True
        removed["unknown"] = len(asked) - len(rows)

    def remove(reason: str, rows: Rows) -> None:
        rows = _below(rows, len(allowed_R))
        removed[reason] = removed.get(reason, 0) + int(allowed_R[rows].sum())
        allowed_R[rows] = False

    remove("excluded", catalogue.rows(set(request.exclude)))
    remove("hidden", catalogue.rows({touch.item_id for touch in profile.recent if touch.action == "hide"}))
    if not request.keep_seen:
        remove("seen", catalogue.rows(profile.clicks.seen.keys() | profile.ratings.seen.keys()))
    fitting_R = fitting(catalogue, filters, allowed_R)
    removed["filtered"] = int(allowed_R.sum() - fitting_R.sum())
    return fitting_R, {reason: count for reason, count in removed.items() if count}


def _offers(
    catalogue: Catalogue, vectors_RD: Vector, request: PoolRequest, allowed_R: Flags, rng: np.random.Generator
) -> dict[Source, Rows]:
    limit, now_ms, profile = request.num_candidates, request.now_ms, request.profile
    offers: dict[Source, Rows] = {}
    if request.query_D is not None:
        offers["query"] = nearest(vectors_RD, request.query_D, allowed_R, limit)
    if request.user_D is not None:
        offers["user"] = nearest(vectors_RD, request.user_D, allowed_R, limit)
    if request.history_D is not None:
        offers["history"] = nearest(vectors_RD, request.history_D, allowed_R, limit)
    if profile.clicks.last_items:
        offers["covisited"] = covisited(catalogue, profile, allowed_R, now_ms, limit)
    if request.pulls or (request.tag_worth_V is not None and request.tag_worth_V.any()):
        offers["interests"] = of_interest(catalogue, request.pulls, request.tag_worth_V, allowed_R, limit)
    offers["trending"] = trending(catalogue, allowed_R, now_ms, limit)
    offers["fresh"] = fresh(catalogue, allowed_R, limit)
    offers["cold"] = cold(catalogue, allowed_R, now_ms, limit, rng)
    return offers


def _merge(offers: Mapping[Source, Rows], num_candidates: int) -> dict[int, Source]:
    named: dict[int, Source] = {}
    total = sum(_SHARES[source] for source in offers)
    for source, rows in offers.items():
        room = min(round(num_candidates * _SHARES[source] / total), num_candidates - len(named))
        for row in rows.tolist():
            if room <= 0:
                break
            if row not in named:
                named[row] = source
                room -= 1
    for row, source in _in_turn_named(offers):
        if len(named) >= num_candidates:
            break
        named.setdefault(row, source)
    return named


def _in_turn_named(offers: Mapping[Source, Rows]) -> Iterator[tuple[int, Source]]:
    for tier in zip_longest(*(rows.tolist() for rows in offers.values())):
        yield from ((row, source) for row, source in zip(tier, offers, strict=True) if row is not None)


def _in_turn(lists: Sequence[Rows]) -> Rows:
    tiers = zip_longest(*(rows.tolist() for rows in lists))
    return np.array(list(dict.fromkeys(row for tier in tiers for row in tier if row is not None)), dtype=np.int64)


def _top(score_R: NDArray[np.floating], allowed_R: Flags, limit: int) -> Rows:
    rows = np.flatnonzero(allowed_R)
    if len(rows) > limit:
        rows = rows[np.argpartition(-score_R[rows], limit - 1)[:limit]]
    return rows[np.argsort(-score_R[rows], kind="stable")]


def _below(rows: Rows, size: int) -> Rows:
    return rows[rows < size]  # the catalogue may have grown since its size was read
