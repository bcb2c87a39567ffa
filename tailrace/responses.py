"""What a user makes of tags and entities: interests, and how they received what was shown to them. Pure.

Interests grow with clicks alone, so they cannot tell a tag that was shown fifty times and clicked once from one that
was shown once and clicked once. A response can, and it says what passing over means, which nobody reports as an event.

Shapes: N candidates.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tailrace.events import Answer
from tailrace.ids import ItemId
from tailrace.items import TAG
from tailrace.profile import INTEREST_HALF_LIFE_MS, Profile
from tailrace.tastes import MOST_TAGS, most_answered
from tailrace.topic_index import Topics

# Evidence is weighed against this many clicks of none: a tag's first showings move its response little. Chosen in
# `tailrace.world`, where half of it or less ranks worse than interests do, and twice of it no better.
_PRIOR_CLICKS = 8.0
_USUAL_RATE, _USUAL_WEIGHT = 0.05, 40.0  # clicks per item shown, before a user has a rate of their own

_UNSEEN = (0, 0)
_NO_ANSWER = (0.0, 0.0)

TOPIC_NAMES = ("tag_affinity", "entity_affinity", "tag_response", "entity_response", "tag_exposure")

TopicsOf = Callable[[ItemId], Sequence[str]]


@dataclass(frozen=True)
class Responses:
    """By topic: the log of clicks over those to be expected of its showings at the user's own rate, and showings.

    `answers` is what a model infers tastes from (`tailrace.tastes`): by tag, how much was clicked and how much shown,
    an item with n tags counting 1 / sqrt(n) for each, as it does where the worths of tags are summed.
    """

    log_lift: Mapping[str, float]
    shown: Mapping[str, float]
    answers: Mapping[str, Answer]


def gather_responses(profile: Profile, topics_of: TopicsOf, now_ms: int) -> Responses:
    """Returns the responses to every topic of the items that the profile remembers as shown.

    Showings and clicks fade as interests do. An item clicked without being shown, as on a site that logs no
    impressions, tells nothing here: nobody knows what was passed over for it.
    """
    seen = profile.impressions.seen
    shown, num_shown = _by_topic(seen, topics_of, now_ms)
    answered = {item_id: held for item_id, held in profile.clicks.seen.items() if item_id in seen}
    clicked, num_clicks = _by_topic(answered, topics_of, now_ms)
    rate = (num_clicks + _USUAL_RATE * _USUAL_WEIGHT) / (num_shown + _USUAL_WEIGHT)
    log_lift = {
        topic: float(np.log((clicked.get(topic, 0.0) + _PRIOR_CLICKS) / (rate * shown.get(topic, 0.0) + _PRIOR_CLICKS)))
        for topic in shown
    }
    return Responses(log_lift, shown, most_answered(_answers(profile, topics_of, now_ms)))


def topic_columns(
    topics_N: Sequence[Topics], interests: Mapping[str, float], responses: Responses
) -> Mapping[str, NDArray[np.float64]]:
    """Returns columns [N] by the names in TOPIC_NAMES.

    Affinities are cosines between the user's decayed interests and each item's tags, or entities, as sparse vectors.
    """
    tag_norm, entity_norm = _norms(interests)
    tags_N, entities_N = [topics.tags for topics in topics_N], [topics.entities for topics in topics_N]
    return {
        "tag_affinity": sum_over(interests, tags_N) / tag_norm,
        "entity_affinity": sum_over(interests, entities_N) / entity_norm,
        "tag_response": sum_over(responses.log_lift, tags_N),
        "entity_response": sum_over(responses.log_lift, entities_N),
        "tag_exposure": np.log1p(sum_over(responses.shown, tags_N)),
    }


def topic_pulls(
    interests: Mapping[str, float], responses: Responses, weights: Mapping[str, float]
) -> Mapping[str, float]:
    """Returns what each topic adds to an item's score where `topic_columns` are weighed so: for drawing candidates."""
    tag_norm, entity_norm = _norms(interests)
    pulls: dict[str, float] = {}
    for topic in interests.keys() | responses.log_lift.keys():
        kind, norm = ("tag", tag_norm) if topic.startswith(TAG) else ("entity", entity_norm)
        affinity, response = interests.get(topic, 0.0) / norm, responses.log_lift.get(topic, 0.0)
        pulls[topic] = weights.get(f"{kind}_affinity", 0.0) * affinity + weights.get(f"{kind}_response", 0.0) * response
    return pulls


def sum_over(weights: Mapping[str, float], topics_N: Sequence[Sequence[str]]) -> NDArray[np.float64]:
    """Returns float64 [N]: the weights of each item's topics, summed and divided by the root of their number."""
    sizes_N = np.array([len(topics) for topics in topics_N], dtype=np.int64)
    found = [weights.get(topic, 0.0) for topics in topics_N for topic in topics]
    sums_N = np.bincount(np.repeat(np.arange(len(topics_N)), sizes_N), weights=found, minlength=len(topics_N))
    result: NDArray[np.float64] = sums_N / np.sqrt(np.maximum(sizes_N, 1))
    return result


def _norms(interests: Mapping[str, float]) -> tuple[float, float]:
    tags = sum(weight**2 for key, weight in interests.items() if key.startswith(TAG))
    entities = sum(weight**2 for key, weight in interests.items() if not key.startswith(TAG))
    return tags**0.5 or 1.0, entities**0.5 or 1.0


def _answers(profile: Profile, topics_of: TopicsOf, now_ms: int) -> dict[str, Answer]:
    """Returns by tag, without its prefix, how much was clicked and how much shown; an item is clicked once at most."""
    answers: dict[str, Answer] = {}
    clicked = profile.clicks.seen
    for item_id, (last_ms, times) in profile.impressions.seen.items():
        tags = [topic for topic in topics_of(item_id) if topic.startswith(TAG)][:MOST_TAGS] if times else []
        if tags:
            once = _faded(last_ms, now_ms) / len(tags) ** 0.5
            taken = once if clicked.get(item_id, _UNSEEN)[1] else 0.0
            for tag in tags:
                before = answers.get(tag, _NO_ANSWER)
                answers[tag] = before[0] + taken, before[1] + times * once
    return {tag.removeprefix(TAG): answer for tag, answer in answers.items()}


def _by_topic(
    seen: Mapping[ItemId, tuple[int, int]], topics_of: TopicsOf, now_ms: int
) -> tuple[dict[str, float], float]:
    by_topic: dict[str, float] = {}
    total = 0.0
    for item_id, (last_ms, times) in seen.items():
        if times:
            weight = times * _faded(last_ms, now_ms)
            total += weight
            for topic in topics_of(item_id):
                by_topic[topic] = by_topic.get(topic, 0.0) + weight
    return by_topic, total


def _faded(last_ms: int, now_ms: int) -> float:
    """Returns how much of something that old is left."""
    return float(2.0 ** (-max(now_ms - last_ms, 0) / INTEREST_HALF_LIFE_MS))
