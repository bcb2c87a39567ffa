"""The words a model reads: the one maker of user text and item text, in serving and in training. Pure.

Models read from the left and are cut at a number of tokens, so what tells most comes first: for a user where and
when, what was asked for, titles by how they were received (newest first), interests, own words.
"""

import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import UTC, datetime, timedelta, timezone

from tailrace.events import Context
from tailrace.ids import ItemId
from tailrace.items import Fact, Item
from tailrace.profile import Profile, Touch, interest

TEXT_VERSION = 1
MAX_USER_CHARS = 640
MAX_ITEM_CHARS = 480
MAX_TITLES = 8

ItemOf = Callable[[ItemId], Item | None]

_MAX_QUERY_CHARS = 160
_MAX_TITLE_CHARS = 70
_MAX_WORD_CHARS = 40
_MAX_REVIEW_CHARS = 120
_MAX_INTERESTS = 6
_BOUNCE_S = 5.0  # a click left sooner than this was no liking

# How a rating reads: the least share of the scale for each word.
_RATING_WORDS = ((0.85, "loved"), (0.65, "liked"), (0.4, "fine"), (0.0, "disliked"))
_ACTION_WORDS: Mapping[str, str] = {
    "purchase": "loved",
    "share": "loved",
    "save": "loved",
    "like": "loved",
    "click": "liked",
    "view": "fine",
    "skip": "disliked",
    "hide": "disliked",
}
_IMPLICIT = frozenset({"view", "click"})
# Titles under each word at most; what is left of MAX_TITLES goes to "fine", which is all that some sites ever see.
_TITLES_OF: Mapping[str, int] = {"loved": 4, "liked": 4, "fine": MAX_TITLES, "disliked": 2}

_RELATION_PHRASES: Mapping[str, str] = {
    "author": "by {}",
    "writer": "written by {}",
    "artist": "by {}",
    "creator": "by {}",
    "director": "directed by {}",
    "actor": "starring {}",
    "cast": "starring {}",
    "composer": "music by {}",
    "narrator": "read by {}",
    "translator": "translated by {}",
    "publisher": "published by {}",
    "source": "from {}",
    "brand": "made by {}",
    "series": "part of {}",
    "genre": "{}",
    "category": "{}",
    "subcategory": "{}",
    "keyword": "about {}",
    "subject": "about {}",
    "topic": "about {}",
    "character": "with {}",
    "setting": "set in {}",
    "place": "set in {}",
    "country": "from {}",
    "language": "in {}",
    "year": "from {}",
    "period": "from the {}",
    "award": "winner of {}",
}

# Hours east of UTC where most people of a country live, standard time. Enough to tell morning from evening.
_UTC_OFFSET_H: Mapping[str, float] = {
    "AR": -3, "AT": 1, "AU": 10, "BE": 1, "BR": -3, "CA": -5, "CH": 1, "CL": -4, "CN": 8, "CO": -5, "CZ": 1, "DE": 1,
    "DK": 1, "EG": 2, "ES": 1, "FI": 2, "FR": 1, "GB": 0, "GR": 2, "HK": 8, "HU": 1, "ID": 7, "IE": 0, "IL": 2,
    "IN": 5.5, "IT": 1, "JP": 9, "KE": 3, "KR": 9, "MX": -6, "MY": 8, "NG": 1, "NL": 1, "NO": 1, "NZ": 12, "PE": -5,
    "PH": 8, "PK": 5, "PL": 1, "PT": 0, "RO": 2, "RU": 3, "SA": 3, "SE": 1, "SG": 8, "TH": 7, "TR": 3, "TW": 8,
    "UA": 2, "US": -6, "VN": 7, "ZA": 2,
}  # fmt: skip
_WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")


def render_user(profile: Profile, context: Context | None, query: str | None, item_of: ItemOf, now_ms: int) -> str:
    """Returns the user as one line of at most MAX_USER_CHARS characters, without control characters.

    `item_of` looks titles up; items it does not know are passed over. `context` is the one that holds now, or None.
    A user of whom nothing is known reads "new reader".

    >>> render_user(Profile("u1"), None, "ghost stories", lambda item_id: None, 0)
    'looking for ghost stories; new reader'
    """
    titles = _titles_by_word(profile, item_of)
    known = [f"{word}: {', '.join(titles[word])}" for word in _TITLES_OF if titles[word]]
    known += _interests_part(profile, now_ms)
    known += _words_part(profile, item_of)
    parts = [*_context_part(context, now_ms), *_query_part(query), *(known or ["new reader"])]
    return _cut("; ".join(parts), MAX_USER_CHARS)


def render_item(item: Item) -> str:
    """Returns the item as one line of at most MAX_ITEM_CHARS characters: title, tags, facts, description.

    >>> render_item(Item(item_id="b1", title="Frankenstein", tags=["gothic"], facts=[Fact("author", "Mary Shelley")]))
    'Frankenstein. gothic. by Mary Shelley'
    """
    tags = ", ".join(_distinct(clean(tag, _MAX_WORD_CHARS) for tag in item.tags[:8]))
    facts = ", ".join(_distinct(_phrase(fact) for fact in item.facts[:6]))
    parts = [clean(item.title, 120), tags, facts, clean(item.description, 240)]
    return _cut(". ".join(part for part in parts if part) or "untitled", MAX_ITEM_CHARS)


def clean(text: str, max_chars: int) -> str:
    """Returns `text` in composed form, control characters and runs of white space as one space, cut at a word."""
    composed = unicodedata.normalize("NFC", text[: max_chars * 4])
    shown = "".join(" " if unicodedata.category(char)[0] in "CZ" else char for char in composed)
    return _cut(" ".join(shown.split()), max_chars)


def local_time(context: Context | None, now_ms: int) -> datetime:
    """Returns `now_ms` on the user's wall clock, as far as the context tells; UTC otherwise.

    An offset in `occurred_at` counts first, then the country, then the region of the locale (`pt-BR`).
    """
    offset = timedelta(0)
    if context is not None:
        stated = context.occurred_at.utcoffset() if isinstance(context.occurred_at, datetime) else None
        locale_region = (context.locale or "").replace("_", "-").rpartition("-")[2]
        country = (context.country or locale_region).upper()
        offset = stated or timedelta(hours=_UTC_OFFSET_H.get(country, 0.0))
    seconds = min(max(now_ms / 1000, 0.0), 253_402_000_000.0)
    return datetime.fromtimestamp(seconds, tz=UTC).astimezone(timezone(offset))


def is_mobile(context: Context | None) -> bool:
    """Returns whether the context speaks of a phone or a tablet."""
    if context is None:
        return False
    told = f"{context.device or ''} {context.platform or ''}".lower()
    return any(word in told for word in ("mobile", "phone", "android", "ios", "tablet", "ipad"))


def touch_word(touch: Touch) -> str:
    """Returns how a touch reads: loved, liked, fine or disliked."""
    if touch.action == "rate":
        return next((word for least, word in _RATING_WORDS if touch.value >= least), "disliked")
    if touch.action == "click" and 0 < touch.value < _BOUNCE_S:
        return "fine"
    return _ACTION_WORDS.get(touch.action, "fine")


def item_words(profile: Profile) -> dict[ItemId, str]:
    """Returns how each recent item was received, newest touch first. What was said outright outweighs mere clicks."""
    words: dict[ItemId, str] = {}
    implicit: set[ItemId] = set()
    for touch in reversed(profile.recent):
        if touch.item_id not in words:
            words[touch.item_id] = touch_word(touch)
            if touch.action in _IMPLICIT:
                implicit.add(touch.item_id)
        elif touch.item_id in implicit and touch.action not in _IMPLICIT:
            words[touch.item_id] = touch_word(touch)
            implicit.discard(touch.item_id)
    return words


def now_interests(profile: Profile, now_ms: int) -> dict[str, float]:
    """Returns the user's interest in each tag (`tag:gothic`) and entity (`author:Mary Shelley`), decayed to now."""
    weights: dict[str, float] = {}
    for strand in (profile.clicks, profile.ratings):
        for key, held in strand.interests.items():
            weights[key] = weights.get(key, 0.0) + interest(held, now_ms)
    return weights


def _context_part(context: Context | None, now_ms: int) -> list[str]:
    if context is None:
        return []
    local = local_time(context, now_ms)
    words = [f"{_WEEKDAYS[local.weekday()]} {_daypart(local.hour)}"]
    words += [value for value in (context.device, context.platform, context.place, context.country) if value]
    words += [
        name if value is True else f"{name} {value}"
        for name, value in sorted(context.attributes.items())[:3]
        if value is not False
    ]
    return ["on " + ", ".join(_distinct(clean(word, 24) for word in words))]


def _daypart(hour: int) -> str:
    if hour < 5:
        return "night"
    if hour < 12:
        return "morning"
    return "afternoon" if hour < 18 else "evening"


def _query_part(query: str | None) -> list[str]:
    wanted = clean(query or "", _MAX_QUERY_CHARS)
    return [f"looking for {wanted}"] if wanted else []


def _titles_by_word(profile: Profile, item_of: ItemOf) -> dict[str, list[str]]:
    titles: dict[str, list[str]] = {word: [] for word in _TITLES_OF}
    for item_id, word in item_words(profile).items():
        held = titles[word]
        item = item_of(item_id) if len(held) < _TITLES_OF[word] else None
        title = clean(item.title, _MAX_TITLE_CHARS) if item is not None else ""
        if title and title not in held:
            held.append(title)
    room = MAX_TITLES - sum(len(titles[word]) for word in ("loved", "liked", "disliked"))
    titles["fine"] = titles["fine"][: max(room, 1)]
    return titles


def _interests_part(profile: Profile, now_ms: int) -> list[str]:
    weights = now_interests(profile, now_ms)
    strongest = sorted((key for key in weights if weights[key] > 0), key=lambda key: (-weights[key], key))
    names = list(_distinct(clean(key.partition(":")[2], _MAX_WORD_CHARS) for key in strongest[: 2 * _MAX_INTERESTS]))
    return [f"interested in {', '.join(names[:_MAX_INTERESTS])}"] if names else []


def _words_part(profile: Profile, item_of: ItemOf) -> list[str]:
    parts = []
    for review in sorted(profile.reviews, reverse=True, key=lambda review: (review.at_ms, review.item_id))[:2]:
        item, said = item_of(review.item_id), clean(review.text, _MAX_REVIEW_CHARS)
        if said:
            parts.append(f"on {clean(item.title, _MAX_TITLE_CHARS)}: {said}" if item is not None else f"said {said}")
    return parts


def _phrase(fact: Fact) -> str:
    relation = clean(fact.relation.replace("_", " ").replace("-", " "), _MAX_WORD_CHARS).lower()
    entity = clean(fact.entity, _MAX_WORD_CHARS)
    phrase = _RELATION_PHRASES.get(relation)
    return (phrase.format(entity) if phrase else f"{relation} {entity}".strip()) if entity else ""


def _distinct(texts: Iterable[str]) -> Iterator[str]:
    seen: set[str] = set()
    for text in texts:
        folded = text.casefold()
        if text and folded not in seen:
            seen.add(folded)
            yield text


def _cut(text: str, max_chars: int) -> str:
    if len(text) <= max_chars:
        return text
    head = text[:max_chars]
    at_word = head.rpartition(" ")[0]
    return (at_word if len(at_word) > max_chars // 2 else head).rstrip()
