"""What a model reads of a user and of an item."""

import unicodedata
from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tailrace.counters import CounterTable
from tailrace.events import Action, Click, Context, Rating
from tailrace.fold import fold_event
from tailrace.ids import EventId, ItemId, UserId
from tailrace.items import Fact, Item
from tailrace.profile import Profile, decode_profile, encode_profile
from tailrace.text import MAX_ITEM_CHARS, MAX_TITLES, MAX_USER_CHARS, clean, is_mobile, render_item, render_user
from tests.strategies import CATALOGUE, clicks, contexts, ratings

MONDAY_9_UTC_MS = 1_699_866_000_000  # Monday, 13 November 2023, 09:00 UTC
BOOKS = {
    name: Item(item_id=ItemId(name), title=name.title(), tags=["gothic"], facts=[Fact("author", "Mary Shelley")])
    for name in ("frankenstein", "dracula", "emma", "persuasion", "ulysses", "middlemarch", "villette", "walden")
}


def item_of(item_id: ItemId) -> Item | None:
    return BOOKS.get(item_id)


def profile_of(*events: tuple[str, Action | float]) -> Profile:
    """A profile folded from (book, action or stars), a minute apart."""
    profile = Profile(UserId("u1"))
    for number, (name, what) in enumerate(events):
        about = {
            "event_id": EventId(f"e{number}"),
            "user_id": UserId("u1"),
            "item_id": ItemId(name),
            "occurred_at": MONDAY_9_UTC_MS - 3_600_000 + number * 60_000,
        }
        event = Rating(value=what, **about) if isinstance(what, float) else Click(action=what, **about)
        fold_event(event, profile, CounterTable(), BOOKS.get(name))
    return profile


def context(**fields: object) -> Context:
    return Context(event_id=EventId("c1"), user_id=UserId("u1"), **({"occurred_at": MONDAY_9_UTC_MS} | fields))


def read(profile: Profile, query: str | None = None, now: Context | None = None) -> str:
    return render_user(profile, now, query, item_of, MONDAY_9_UTC_MS)


def test_a_user_reads_as_context_query_titles_and_interests_in_this_order() -> None:
    profile = profile_of(("emma", 1.0), ("walden", 3.0), ("dracula", "click"), ("frankenstein", 5.0))
    assert read(profile, "ghost stories", context(device="mobile", country="GB")) == (
        "on Monday morning, mobile, GB; looking for ghost stories; loved: Frankenstein; liked: Dracula; fine: Walden;"
        " disliked: Emma; interested in Mary Shelley, gothic"
    )


def test_titles_come_newest_first_and_once() -> None:
    profile = profile_of(("emma", "click"), ("dracula", "click"), ("emma", "click"))
    assert "liked: Emma, Dracula" in read(profile)


def test_what_was_said_outright_outweighs_a_later_click() -> None:
    assert "disliked: Emma" in read(profile_of(("emma", 1.0), ("emma", "click")))
    assert "loved: Emma" in read(profile_of(("emma", 1.0), ("emma", 5.0)))


@pytest.mark.parametrize(
    ("what", "word"),
    [
        (5.0, "loved"),
        (4.0, "liked"),
        (3.0, "fine"),
        (2.0, "disliked"),
        ("save", "loved"),
        ("purchase", "loved"),
        ("click", "liked"),
        ("view", "fine"),
        ("hide", "disliked"),
        ("skip", "disliked"),
    ],
)
def test_ratings_and_actions_become_words(what: Action | float, word: str) -> None:
    assert f"{word}: Emma" in read(profile_of(("emma", what)))


def test_a_click_left_at_once_was_no_liking() -> None:
    profile = Profile(UserId("u1"))
    bounce = Click(event_id=EventId("e"), user_id=UserId("u1"), item_id=ItemId("emma"), occurred_at=0, dwell_s=1.0)
    fold_event(bounce, profile, CounterTable(), None)
    assert "fine: Emma" in read(profile)


def test_a_user_with_nothing_but_views_still_has_a_history() -> None:
    many = read(profile_of(*((name, "view") for name in BOOKS)))
    assert sum(book.title in many for book in BOOKS.values()) == MAX_TITLES


def test_own_words_are_read_last() -> None:
    profile = profile_of(("emma", 5.0))
    said = Rating(
        event_id=EventId("r"),
        user_id=UserId("u1"),
        item_id=ItemId("emma"),
        occurred_at=MONDAY_9_UTC_MS,
        value=5,
        review="Made me\nlaugh",
    )
    fold_event(said, profile, CounterTable(), None)
    assert read(profile).endswith("on Emma: Made me laugh")


def test_a_new_user_is_called_so_and_unknown_items_are_passed_over() -> None:
    assert read(Profile(UserId("u1"))) == "new reader"
    assert read(profile_of(("not-a-book", "click"))) == "new reader"


@pytest.mark.parametrize(
    ("told", "read_as"),
    [
        ({}, "Monday morning"),
        ({"country": "JP"}, "Monday evening"),
        ({"country": "US"}, "Monday night"),
        ({"locale": "pt-BR"}, "Monday morning"),
        ({"locale": "ja_JP"}, "Monday evening"),
        ({"occurred_at": datetime.fromtimestamp(1_699_866_000, tz=timezone(timedelta(hours=5)))}, "Monday afternoon"),
        ({"occurred_at": datetime.fromtimestamp(1_699_866_000, tz=UTC), "country": "CN"}, "Monday afternoon"),
    ],
)
def test_the_time_of_day_is_the_users_own_where_the_context_tells(told: dict[str, object], read_as: str) -> None:
    assert read_as in read(Profile(UserId("u1")), now=context(**told))


def test_phones_and_tablets_are_mobile() -> None:
    assert is_mobile(context(device="Mobile"))
    assert is_mobile(context(platform="android"))
    assert not is_mobile(context(device="desktop", platform="web"))
    assert not is_mobile(None)


def test_facts_are_said_in_words() -> None:
    item = Item(
        item_id=ItemId("f"),
        title="Frankenstein",
        tags=["gothic", "Gothic", "science"],
        facts=[Fact("author", "Mary Shelley"), Fact("director", "James Whale"), Fact("first_line_of", "Walton")],
        description="A student\tmakes a man.",
    )
    assert render_item(item) == (
        "Frankenstein. gothic, science. by Mary Shelley, directed by James Whale, first line of Walton."
        " A student makes a man."
    )


def test_text_is_cut_at_a_word() -> None:
    assert clean("one two three", 9) == "one two"
    assert clean("x" * 30, 10) == "x" * 10


def _is_one_clean_line(text: str, max_chars: int) -> bool:
    return len(text) <= max_chars and not any(unicodedata.category(char) in ("Cc", "Cs", "Zl", "Zp") for char in text)


anything = st.text(max_size=200)


@settings(max_examples=150, deadline=None)
@given(
    title=st.text(min_size=1, max_size=300),
    tags=st.lists(anything, max_size=10),
    facts=st.lists(st.builds(Fact, anything, anything), max_size=10),
    description=st.text(max_size=600),
)
def test_any_item_reads_as_one_bounded_line(title: str, tags: list[str], facts: list[Fact], description: str) -> None:
    item = Item(item_id=ItemId("i"), title=title, tags=tags, facts=facts, description=description)
    text = render_item(item)
    assert text
    assert _is_one_clean_line(text, MAX_ITEM_CHARS)
    assert text == render_item(item)


@settings(max_examples=150, deadline=None)
@given(
    events=st.lists(clicks | ratings | contexts, max_size=30),
    query=st.none() | st.text(max_size=400),
    now=st.none() | contexts,
    now_ms=st.integers(0, 253_402_300_799_000),
)
def test_any_user_reads_as_one_bounded_line_before_and_after_storing(
    events: list[Click | Rating | Context], query: str | None, now: Context | None, now_ms: int
) -> None:
    profile = Profile(UserId("u0"))
    for event in events:
        fold_event(event, profile, CounterTable(), CATALOGUE.get(getattr(event, "item_id", "")))
    text = render_user(profile, now, query, CATALOGUE.get, now_ms)
    assert _is_one_clean_line(text, MAX_USER_CHARS)
    assert text == render_user(decode_profile(encode_profile(profile)), now, query, CATALOGUE.get, now_ms)
