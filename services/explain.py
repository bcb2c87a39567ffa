"""Why an item is in a slate, in words a reader understands. Pure.

Each reason needs its evidence: a feature that stands out, a near item, an interest. What moved the score most comes
first.

Shapes: N items of the slate, F features, R recent items, D vector size.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tailrace.catalogue import Catalogue, Rows
from tailrace.cosines import Floats
from tailrace.features import FEATURE_NAMES, PRIOR_WEIGHTS
from tailrace.ids import ItemId
from tailrace.items import Item
from tailrace.profile import Profile
from tailrace.text import clean, item_words

MAX_REASONS = 3

_NEAR = 0.45  # cosine from which two items count as alike
_STANDS_OUT = 0.9  # rank within the pool from which a number counts as high
_MATCH = 0.3  # cosine from which an item counts as matching a query
_FEATURE = {name: index for index, name in enumerate(FEATURE_NAMES)}
_READ_AS = {"loved": "loved", "liked": "liked", "fine": "looked at"}


@dataclass(frozen=True)
class Evidence:
    """What is known of one item's place: its features, who proposed it, and what of the user's it resembles."""

    item: Item
    features_F: Floats
    source: str
    explored: bool
    near_title: str = ""  # the user's recent item that is nearest
    near_word: str = "liked"  # how that one was received
    near_cosine: float = 0.0
    covisit_title: str = ""  # the user's last item with which others touched this one


def gather_evidence(
    catalogue: Catalogue,
    rows_N: Rows,
    features_NF: Floats,
    sources_N: Sequence[str],
    explored_N: Sequence[bool],
    profile: Profile,
    items_ND: NDArray[np.floating],
    recent: Sequence[ItemId],
    recent_RD: NDArray[np.floating],
    now_ms: int,
) -> list[Evidence | None]:
    """Returns the evidence for each item of a slate, None for one that has just been removed.

    `recent` and the rows of `recent_RD` go together (`cosines.history_items`, those that have a vector); vectors
    are of unit length. [N] and [N, ...] arguments are of the slate, in its order.
    """
    words = item_words(profile)
    covisited = {other: catalogue.covisits(other, now_ms) for other in profile.clicks.last_items}
    near_NR = items_ND.astype(np.float32) @ recent_RD.astype(np.float32).T if len(recent) else None
    found: list[Evidence | None] = []
    for index, item in enumerate(catalogue.items_at(rows_N)):
        if item is None:
            found.append(None)
            continue
        itself_R = [other == item.item_id for other in recent]
        near_R = None if near_NR is None else np.where(itself_R, -1.0, near_NR[index])
        nearest = None if near_R is None else int(np.argmax(near_R))
        together = _most_together(item.item_id, covisited)
        found.append(
            Evidence(
                item=item,
                features_F=features_NF[index],
                source=sources_N[index],
                explored=explored_N[index],
                near_title="" if nearest is None else _title(catalogue, recent[nearest]),
                near_word="liked" if nearest is None else words.get(recent[nearest], "liked"),
                near_cosine=0.0 if near_R is None else float(near_R.max()),
                covisit_title="" if together is None else _title(catalogue, together),
            )
        )
    return found


def explain(evidence: Evidence, *, query: str | None, interests: Mapping[str, float]) -> list[str]:
    """Returns one to MAX_REASONS reasons, the weightiest first. `interests` is `text.now_interests`.

    Weights are what the features in question add to the score of version 0, so later models are explained by the
    same evidence, if not by their own arithmetic.
    """
    weighed = [
        *_query_reasons(evidence, query),
        *_near_reasons(evidence),
        *_interest_reasons(evidence, interests),
        *_covisit_reasons(evidence),
        *_popular_reasons(evidence),
        *_new_reasons(evidence),
    ]
    reasons = [reason for _, reason in sorted(weighed, key=lambda entry: -entry[0])]
    if evidence.explored:
        reasons.insert(0, "something different, to learn whether you like it")
    return reasons[:MAX_REASONS] or [_FALLBACKS.get(evidence.source, "one of the best matches we have")]


_FALLBACKS = {
    "caller": "best of the items asked about",
    "cold": "not yet discovered by many",
    "trending": "others like it",
}


def _title(catalogue: Catalogue, item_id: ItemId) -> str:
    item = catalogue.item(item_id)
    return "" if item is None else clean(item.title, 60)


def _most_together(item_id: ItemId, covisited: Mapping[ItemId, Mapping[ItemId, float]]) -> ItemId | None:
    weights = {other: held[item_id] for other, held in covisited.items() if item_id in held}
    return max(weights, key=lambda other: weights[other]) if weights else None


def _value(evidence: Evidence, name: str) -> float:
    return float(evidence.features_F[_FEATURE[name]])


def _contribution(evidence: Evidence, *names: str) -> float:
    return sum(PRIOR_WEIGHTS.get(name, 0.0) * _value(evidence, name) for name in names)


def _query_reasons(evidence: Evidence, query: str | None) -> list[tuple[float, str]]:
    if not query or _value(evidence, "cos_query") < _MATCH:
        return []
    return [(_contribution(evidence, "cos_query"), f"matches '{clean(query, 60)}'")]


def _near_reasons(evidence: Evidence) -> list[tuple[float, str]]:
    word = _READ_AS.get(evidence.near_word)
    if not evidence.near_title or evidence.near_cosine < _NEAR or word is None:
        return []
    return [(4.0 * evidence.near_cosine, f"because you {word} {evidence.near_title}")]


def _interest_reasons(evidence: Evidence, interests: Mapping[str, float]) -> list[tuple[float, str]]:
    shared = [key for key in evidence.item.topics_of_interest if interests.get(key, 0.0) > 0]
    if not shared:
        return []
    strongest = max(shared, key=lambda key: (interests[key], key))
    weight = max(_contribution(evidence, "tag_affinity", "entity_affinity"), 0.1)
    return [(weight, f"matches your interest in {clean(strongest.partition(':')[2], 40)}")]


def _covisit_reasons(evidence: Evidence) -> list[tuple[float, str]]:
    if not evidence.covisit_title:
        return []
    return [(max(_value(evidence, "covisit"), 0.1), f"others who opened {evidence.covisit_title} opened this too")]


def _popular_reasons(evidence: Evidence) -> list[tuple[float, str]]:
    # A decayed sum may be large of what happened long ago: the last touches tell whether it was within the window.
    minutes = np.expm1(_value(evidence, "log_since_touch_2"))
    for half_life, window_min, words in (("1h", 60, "hour"), ("24h", 24 * 60, "day")):
        users = np.expm1(_value(evidence, f"log_users_{half_life}"))
        if users >= 2 and minutes <= window_min and _value(evidence, f"rank_log_users_{half_life}") >= _STANDS_OUT:
            return [(0.5 * float(np.log1p(users)), f"popular in the last {words}")]
    return []


def _new_reasons(evidence: Evidence) -> list[tuple[float, str]]:
    hours = np.expm1(_value(evidence, "log_age"))
    return [(0.3, "new")] if hours < 7 * 24 and _value(evidence, "rank_newness") >= _STANDS_OUT else []
