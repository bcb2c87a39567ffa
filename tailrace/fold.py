"""The fold: one event into one profile and the counters of the items it is about. Pure but for its arguments.

The stream worker, the recovery tests' oracle and the prequential evaluation all call `fold_event`.
"""

from collections.abc import Iterable, Mapping
from enum import Enum
from typing import Literal, Protocol

import msgspec

from tailrace.counters import CounterTable, apply_count, apply_covisit, apply_visitor, visitor_bucket
from tailrace.counters import apply_touch as apply_item_touch
from tailrace.events import Click, Context, Impression, Rating, UserEvent
from tailrace.ids import ItemId
from tailrace.profile import (
    MAX_LAST_ITEMS,
    MAX_REVIEW_CHARS,
    MAX_REVIEWS,
    Profile,
    Review,
    Strand,
    Touch,
    apply_interest,
    apply_seen,
    apply_touch,
    is_repeat,
)

# What one action says of a user's interest in an item's tags and entities.
INTEREST_WEIGHTS: Mapping[str, float] = {
    "view": 0.5,
    "click": 1.0,
    "like": 2.0,
    "save": 2.0,
    "share": 2.5,
    "purchase": 3.0,
    "skip": -0.5,
    "hide": -2.0,
}
NEGATIVE_ACTIONS = frozenset({"skip", "hide"})
LIKING_ACTIONS = frozenset({"like", "save", "share", "purchase"})
Stream = Literal["clicks", "ratings", "contexts", "impressions"]
STREAMS: tuple[Stream, ...] = ("clicks", "ratings", "contexts", "impressions")
LIKED_SHARE = 0.7  # a rating at or above this share of its scale counts as liked


class HasTopics(Protocol):
    """What the fold needs of an item: `tailrace.items.Item`, or the little of it that a worker keeps."""

    @property
    def topics_of_interest(self) -> list[str]: ...


class Outcome(Enum):
    """What became of an event."""

    APPLIED = "applied"
    REPEATED = "repeated"
    FORGOTTEN = "forgotten"


def fold_event(event: UserEvent, profile: Profile, counters: CounterTable, item: HasTopics | None) -> Outcome:
    """Folds an event into `profile` and `counters`, in place, and returns what became of it.

    `item` is the item the event is about, where the catalogue knows it: its tags and entities become interests.
    A repeated event id changes nothing; an event from before the user asked to be forgotten changes nothing.
    """
    at_ms = event.at_ms
    match event:
        case Click():
            strand = profile.clicks
        case Rating():
            strand = profile.ratings
        case Context():
            strand = profile.contexts
        case Impression():
            strand = profile.impressions
    if at_ms <= strand.forgotten_before_ms:
        return Outcome.FORGOTTEN
    if is_repeat(strand, event.event_id):
        return Outcome.REPEATED

    strand.events += 1
    if strand.first_at_ms is None or at_ms < strand.first_at_ms:
        strand.first_at_ms = at_ms
    if strand.last_at_ms is None or at_ms > strand.last_at_ms:
        strand.last_at_ms = at_ms
    match event:
        case Click():
            _fold_click(event, at_ms, profile, counters, item)
        case Rating():
            _fold_rating(event, at_ms, profile, counters, item)
        case Context():
            _fold_context(event, at_ms, profile)
        case Impression():
            _fold_impression(event, at_ms, profile, counters)
    return Outcome.APPLIED


def fold_erasure(profile: Profile, at_ms: int, streams: Iterable[Stream] = STREAMS) -> Profile:
    """Returns the profile of a user who asked, at `at_ms`, that what `streams` have told be forgotten.

    It keeps the moment, so that the same events read again from the log are not learnt again. Item counters keep
    their decayed sums: they name nobody. Whoever asks puts one erasure in each of the four streams, all stamped with
    the same time, and each is folded into its own stream's share: then the result does not depend on how the
    streams interleave.
    """
    kept = msgspec.structs.replace(profile)
    for stream in streams:
        forgotten_ms = max(at_ms, getattr(profile, stream).forgotten_before_ms)
        setattr(kept, stream, Strand(forgotten_before_ms=forgotten_ms))
        # By event time, so that it makes no difference whether another stream's touches pushed some out before.
        kept.recent = [touch for touch in kept.recent if touch.at_ms > at_ms or _stream_of(touch) != stream]
        if stream == "ratings":
            kept.reviews = []
        if stream == "contexts":
            kept.context = None
    return kept


def _stream_of(touch: Touch) -> Stream:
    return "ratings" if touch.action == "rate" else "clicks"


def _fold_click(click: Click, at_ms: int, profile: Profile, counters: CounterTable, item: HasTopics | None) -> None:
    strand, action, item_id = profile.clicks, click.action, click.item_id
    dwell_s = click.dwell_s or 0.0
    strand.counts[action] = strand.counts.get(action, 0) + 1
    strand.dwell_s += dwell_s
    apply_touch(profile, Touch(at_ms, item_id, action, dwell_s))
    if item is not None:
        apply_interest(strand, item.topics_of_interest, at_ms, INTEREST_WEIGHTS[action])

    of_item = counters.touch(item_id)
    if action in NEGATIVE_ACTIONS:
        apply_count(of_item, "skipped", at_ms)
        apply_seen(strand, item_id, at_ms, times=0)  # who clicks after all is one of the item's users from then on
        return
    apply_item_touch(of_item, at_ms)
    apply_count(of_item, "clicked", at_ms)
    if action in LIKING_ACTIONS:
        apply_count(of_item, "liked", at_ms)
    if apply_seen(strand, item_id, at_ms):
        apply_count(of_item, "users", at_ms)
        apply_visitor(of_item, visitor_bucket(profile.user_id), at_ms)
        _fold_covisits(strand, item_id, at_ms, counters)


def _fold_covisits(strand: Strand, item_id: ItemId, at_ms: int, counters: CounterTable) -> None:
    of_item = counters.touch(item_id)
    for other in strand.last_items:
        if other != item_id:
            apply_covisit(of_item, other, at_ms)
            apply_covisit(counters.touch(other), item_id, at_ms)
    strand.last_items.append(item_id)
    if len(strand.last_items) > MAX_LAST_ITEMS:
        del strand.last_items[0]


def _fold_rating(rating: Rating, at_ms: int, profile: Profile, counters: CounterTable, item: HasTopics | None) -> None:
    strand, item_id, share = profile.ratings, rating.item_id, rating.share
    strand.counts["rate"] = strand.counts.get("rate", 0) + 1
    apply_touch(profile, Touch(at_ms, item_id, "rate", share))
    apply_seen(strand, item_id, at_ms)
    if item is not None:
        apply_interest(strand, item.topics_of_interest, at_ms, 4.0 * (share - 0.5))
    of_item = counters.touch(item_id)
    apply_count(of_item, "rated", at_ms)
    if share >= LIKED_SHARE:
        apply_count(of_item, "rated_up", at_ms)
    if rating.review:
        profile.reviews.append(Review(at_ms, item_id, share, rating.review[:MAX_REVIEW_CHARS]))
        del profile.reviews[:-MAX_REVIEWS]


def _fold_context(context: Context, at_ms: int, profile: Profile) -> None:
    if profile.context is None or at_ms >= profile.context.at_ms:
        profile.context = context


def _fold_impression(impression: Impression, at_ms: int, profile: Profile, counters: CounterTable) -> None:
    strand = profile.impressions
    strand.counts["shown"] = strand.counts.get("shown", 0) + len(impression.shown)
    for ranked in impression.shown:
        apply_seen(strand, ranked.item_id, at_ms)
        apply_count(counters.touch(ranked.item_id), "shown", at_ms)
