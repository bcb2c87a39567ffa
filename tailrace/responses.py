"""How a user has received what was shown to them, by tag and by entity: clicks against showings. Pure.

Interests grow with clicks alone, so they cannot tell a tag that was shown fifty times and clicked once from one that
was shown once and clicked once. A response can, and it says what passing over means, which nobody reports as an event.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tailrace.ids import ItemId
from tailrace.profile import INTEREST_HALF_LIFE_MS, Profile

# Evidence is weighed against this many clicks of none: a tag's first showings move its response little. Chosen in
# `tailrace.world`, where half of it or less ranks worse than interests do, and twice of it no better.
_PRIOR_CLICKS = 8.0
_USUAL_RATE, _USUAL_WEIGHT = 0.05, 40.0  # clicks per item shown, before a user has a rate of their own

TopicsOf = Callable[[ItemId], Sequence[str]]


@dataclass(frozen=True)
class Responses:
    """By topic: the log of clicks over those to be expected of its showings at the user's own rate, and showings."""

    log_lift: Mapping[str, float]
    shown: Mapping[str, float]


def gather_responses(profile: Profile, topics_of: TopicsOf, now_ms: int) -> Responses:
    """Returns the responses to every topic of the items that the profile remembers as shown or clicked.

    Both fade as interests do. An item clicked without being shown, as on a site that logs no impressions, speaks for
    its topics all the same.
    """
    clicked, num_clicks = _by_topic(profile.clicks.seen, topics_of, now_ms)
    shown, num_shown = _by_topic(profile.impressions.seen, topics_of, now_ms)
    rate = (num_clicks + _USUAL_RATE * _USUAL_WEIGHT) / (num_shown + _USUAL_WEIGHT)
    log_lift = {
        topic: float(np.log((clicked.get(topic, 0.0) + _PRIOR_CLICKS) / (rate * shown.get(topic, 0.0) + _PRIOR_CLICKS)))
        for topic in clicked.keys() | shown.keys()
    }
    return Responses(log_lift, shown)


def sum_over(weights: Mapping[str, float], topics_N: Sequence[Sequence[str]]) -> NDArray[np.float64]:
    """Returns float64 [N]: the weights of each item's topics, summed and divided by the root of their number."""
    sizes_N = np.array([len(topics) for topics in topics_N], dtype=np.int64)
    found = [weights.get(topic, 0.0) for topics in topics_N for topic in topics]
    sums_N = np.bincount(np.repeat(np.arange(len(topics_N)), sizes_N), weights=found, minlength=len(topics_N))
    result: NDArray[np.float64] = sums_N / np.sqrt(np.maximum(sizes_N, 1))
    return result


def _by_topic(
    seen: Mapping[ItemId, tuple[int, int]], topics_of: TopicsOf, now_ms: int
) -> tuple[dict[str, float], float]:
    by_topic: dict[str, float] = {}
    total = 0.0
    for item_id, (last_ms, times) in seen.items():
        if times:
            weight = times * 2.0 ** (-max(now_ms - last_ms, 0) / INTEREST_HALF_LIFE_MS)
            total += weight
            for topic in topics_of(item_id):
                by_topic[topic] = by_topic.get(topic, 0.0) + weight
    return by_topic, total
