"""Profiles: what is known of one user, bounded in every direction, and nothing a reader could not recompute.

A profile is a product of independent folds, one `Strand` per stream, plus the newest touches of two streams, which
do not depend on order (a top-k by time). So the bytes of a profile depend on each stream's own order, which Kafka
keeps, and never on how a partition's streams interleave, which nothing keeps. That holds for forgetting, too: each
stream tells its own strand to forget.
"""

from bisect import insort
from math import exp2

import msgspec

from tailrace.events import Context
from tailrace.ids import EventId, ItemId, UserId

PROFILE_SCHEMA = 1
MAX_RECENT = 100
MAX_EVENT_IDS = 64
MAX_SEEN = 512
MAX_INTERESTS = 96
MAX_LAST_ITEMS = 5
MAX_REVIEWS = 5
MAX_REVIEW_CHARS = 500
INTEREST_HALF_LIFE_MS = 14 * 86_400_000.0


class Touch(msgspec.Struct, frozen=True, order=True, array_like=True):
    """One thing a user did, newest last. `value` is seconds of dwell, or the rating as a share of its scale."""

    at_ms: int
    item_id: ItemId
    action: str
    value: float = 0.0


class Strand(msgspec.Struct, array_like=True):
    """What one stream has told about a user, folded in that stream's order."""

    event_ids: list[EventId] = []
    seen: dict[ItemId, tuple[int, int]] = {}  # item: (last time, times), a skip or a hide being no time
    interests: dict[str, tuple[int, float]] = {}  # tag or entity: (held at, decayed weight)
    last_items: list[ItemId] = []
    counts: dict[str, int] = {}
    dwell_s: float = 0.0
    events: int = 0
    first_at_ms: int | None = None
    last_at_ms: int | None = None
    forgotten_before_ms: int = -1


class Review(msgspec.Struct, frozen=True, array_like=True):
    """A user's own words about an item, cut to 500 characters."""

    at_ms: int
    item_id: ItemId
    share: float
    text: str


class Profile(msgspec.Struct):
    """One user. Mutable; owned by the worker of the user's partition, read by everyone else."""

    user_id: UserId
    schema: int = PROFILE_SCHEMA
    recent: list[Touch] = []
    clicks: Strand = msgspec.field(default_factory=Strand)
    ratings: Strand = msgspec.field(default_factory=Strand)
    impressions: Strand = msgspec.field(default_factory=Strand)
    contexts: Strand = msgspec.field(default_factory=Strand)
    context: Context | None = None
    reviews: list[Review] = []

    @property
    def strands(self) -> tuple[Strand, Strand, Strand, Strand]:
        """What each of the four streams has told."""
        return self.clicks, self.ratings, self.impressions, self.contexts

    @property
    def events(self) -> int:
        """How many events are in the profile."""
        return sum(strand.events for strand in self.strands)

    @property
    def first_at_ms(self) -> int | None:
        """The time of the oldest event in the profile; None before the first."""
        return min((strand.first_at_ms for strand in self.strands if strand.first_at_ms is not None), default=None)

    @property
    def last_at_ms(self) -> int | None:
        """The time of the newest event in the profile; None before the first."""
        return max((strand.last_at_ms for strand in self.strands if strand.last_at_ms is not None), default=None)


def is_repeat(strand: Strand, event_id: EventId) -> bool:
    """Returns whether the event is among the strand's newest 64 ids; remembers it if not."""
    ids = strand.event_ids
    if event_id in ids:
        return True
    ids.append(event_id)
    if len(ids) > MAX_EVENT_IDS:
        del ids[0]
    return False


def apply_touch(profile: Profile, touch: Touch) -> None:
    """Puts a touch into the hundred newest, in time order; a late one lands where it belongs or falls out."""
    recent = profile.recent
    if not recent or recent[-1] <= touch:
        recent.append(touch)
    else:
        insort(recent, touch)
    if len(recent) > MAX_RECENT:
        del recent[0]


def apply_seen(strand: Strand, item_id: ItemId, at_ms: int, *, times: int = 1) -> bool:
    """Returns whether this is the strand's first touch of the item that counts, and notes it.

    With `times` 0 the item is seen from now on, but its first touch is still to come. Of more than 512 items the
    oldest eighth is forgotten; such an item counts as new again.
    """
    held_ms, before = strand.seen.get(item_id, (at_ms, 0))
    strand.seen[item_id] = (max(at_ms, held_ms), before + times)
    if len(strand.seen) > MAX_SEEN:
        newest = sorted(strand.seen, key=lambda item: (strand.seen[item][0], item))[MAX_SEEN // 8 :]
        strand.seen = {item: strand.seen[item] for item in sorted(newest)}
    return before == 0 and times > 0


def apply_interest(strand: Strand, keys: list[str], at_ms: int, weight: float) -> None:
    """Adds `weight` to each tag or entity; of more than 96 the weakest third is forgotten."""
    interests = strand.interests
    for key in keys:
        held = interests.get(key)
        if held is None:
            interests[key] = (at_ms, weight)
        elif at_ms >= held[0]:
            interests[key] = (at_ms, interest(held, at_ms) + weight)
        else:
            interests[key] = (held[0], held[1] + weight * exp2((at_ms - held[0]) / INTEREST_HALF_LIFE_MS))
    if len(interests) > MAX_INTERESTS:
        now_ms = max(held[0] for held in interests.values())
        strongest = sorted(interests, key=lambda key: (-abs(interest(interests[key], now_ms)), key))
        strand.interests = {key: interests[key] for key in strongest[: MAX_INTERESTS * 2 // 3]}


def interest(held: tuple[int, float], at_ms: int) -> float:
    """Returns an interest's weight at `at_ms`."""
    return held[1] * exp2(-max(at_ms - held[0], 0) / INTEREST_HALF_LIFE_MS)


def current_context(profile: Profile, now_ms: int) -> Context | None:
    """Returns the user's context if it still holds."""
    context = profile.context
    if context is None or now_ms > context.at_ms + context.ttl_s * 1000:
        return None
    return context


_decoder = msgspec.msgpack.Decoder(Profile)
_encoder = msgspec.msgpack.Encoder()


def encode_profile(profile: Profile) -> bytes:
    """Returns the profile as it is stored (msgpack). Equal histories give equal bytes."""
    return _encoder.encode(profile)


def decode_profile(data: bytes) -> Profile:
    """Returns a stored profile."""
    return _decoder.decode(data)
