"""What the API tells of a user, an item and the models: views made of stored state. Pure."""

import msgspec

from tailrace.catalogue import Catalogue
from tailrace.counters import HALF_LIVES_S, KINDS
from tailrace.events import Context
from tailrace.ids import ItemId, UserId
from tailrace.items import Item
from tailrace.profile import Profile, current_context
from tailrace.text import now_interests

_MAX_INTERESTS = 30
_DAY = HALF_LIVES_S.index(86_400.0)


class Interest(msgspec.Struct, frozen=True):
    """A tag (`tag:gothic`) or entity (`author:Mary Shelley`) and its weight, decayed to now."""

    key: str
    weight: float


class RecentTouch(msgspec.Struct, frozen=True):
    """One thing the user did. `value` is seconds of dwell, or the rating as a share of its scale."""

    at_ms: int
    item_id: ItemId
    action: str
    value: float = 0.0


class ProfilePage(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of a user, in plain words and numbers. `recent` is newest first."""

    user_id: UserId
    events: int
    first_at_ms: int | None
    last_at_ms: int | None
    interests: list[Interest]
    recent: list[RecentTouch]
    context: Context | None
    counts: dict[str, int]
    seen: int
    reviews: int


class ItemPage(msgspec.Struct, frozen=True, kw_only=True):
    """An item as announced, and what users have done with it over the last day, decayed."""

    item: Item
    last_day: dict[str, float]


class SimilarItem(msgspec.Struct, frozen=True, kw_only=True):
    """An item close to another: `score` is the cosine of their texts, or the share of tags and entities they share."""

    item_id: ItemId
    title: str
    score: float


class SimilarPage(msgspec.Struct, frozen=True, kw_only=True):
    """The nearest items, nearest first. `degraded`: `no_text` when no ranker could say and tags had to."""

    item_id: ItemId
    degraded: str
    items: list[SimilarItem]


def profile_page(profile: Profile, now_ms: int) -> ProfilePage:
    """Returns the user's page."""
    interests = sorted(now_interests(profile, now_ms).items(), key=lambda entry: (-abs(entry[1]), entry[0]))
    counts: dict[str, int] = {}
    for strand in (profile.clicks, profile.ratings, profile.impressions):
        counts |= strand.counts
    return ProfilePage(
        user_id=profile.user_id,
        events=profile.events,
        first_at_ms=profile.first_at_ms,
        last_at_ms=profile.last_at_ms,
        interests=[Interest(key, round(weight, 4)) for key, weight in interests[:_MAX_INTERESTS]],
        recent=[RecentTouch(one.at_ms, one.item_id, one.action, one.value) for one in reversed(profile.recent)],
        context=current_context(profile, now_ms),
        counts=counts,
        seen=len(profile.clicks.seen.keys() | profile.ratings.seen.keys()),
        reviews=len(profile.reviews),
    )


def item_page(catalogue: Catalogue, item_id: ItemId, now_ms: int) -> ItemPage | None:
    """Returns the item's page, or None where it is unknown."""
    item, rows = catalogue.item(item_id), catalogue.rows([item_id])
    if item is None or not len(rows):
        return None
    of_day = catalogue.decayed_sums(rows, now_ms)[0, :, _DAY].tolist()
    return ItemPage(item=item, last_day={kind: round(value, 3) for kind, value in zip(KINDS, of_day, strict=True)})


def similar_by_topics(catalogue: Catalogue, item_id: ItemId, n: int) -> list[SimilarItem]:
    """Returns the n items that share most tags and entities with this one, by Jaccard index; none if it is unknown."""
    row = catalogue.row(item_id)
    if row is None:
        return []
    own = set(catalogue.topics_at([row])[0])
    others = sorted({other for key in own for other in catalogue.topic_rows(key).tolist()} - {row})
    shares = [
        (len(own.intersection(topics)) / len(own.union(topics)), item)
        for item, topics in zip(catalogue.items_at(others), catalogue.topics_at(others), strict=True)
        if item is not None
    ]
    best = sorted(shares, key=lambda entry: (-entry[0], entry[1].item_id))[:n]
    return [SimilarItem(item_id=item.item_id, title=item.title, score=round(share, 4)) for share, item in best]
