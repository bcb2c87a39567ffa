"""The bundled demo catalogue keeps its promises to the item format."""

import json
from collections import Counter
from importlib.resources import files
from typing import Any

import pytest

KEYS = ["item_id", "title", "tags", "facts", "description", "attributes"]
FORMS = {
    "novel",
    "novella",
    "stories",
    "play",
    "poetry",
    "essays",
    "nonfiction",
    "memoir",
    "epic",
    "children",
}
RELATIONS = {"author", "language", "period", "setting", "series"}
Book = dict[str, Any]


@pytest.fixture(scope="module")
def books() -> list[Book]:
    text = files("tailrace.data").joinpath("books.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def entities(book: Book, relation: str) -> list[str]:
    return [fact["entity"] for fact in book["facts"] if fact["relation"] == relation]


def test_catalogue_has_at_least_400_books(books: list[Book]) -> None:
    assert len(books) >= 400


def test_ids_and_title_author_pairs_are_unique(books: list[Book]) -> None:
    assert len({book["item_id"] for book in books}) == len(books)
    assert len({(book["title"], *entities(book, "author")) for book in books}) == len(books)


def test_every_field_is_present_in_order_and_of_its_type(books: list[Book]) -> None:
    for book in books:
        assert list(book) == KEYS, book
        texts = [book["item_id"], book["title"], book["description"], *book["tags"]]
        assert all(isinstance(text, str) and text and text == text.strip() for text in texts), book
        assert list(book["attributes"]) == ["year", "form"], book
        assert book["attributes"]["form"] in FORMS, book


def test_facts_start_with_the_author_and_name_one_language(books: list[Book]) -> None:
    for book in books:
        assert all(list(fact) == ["relation", "entity"] for fact in book["facts"]), book
        assert all(isinstance(fact["entity"], str) and fact["entity"] for fact in book["facts"]), book
        assert {fact["relation"] for fact in book["facts"]} <= RELATIONS, book
        assert book["facts"][0]["relation"] == "author", book
        assert len(entities(book, "language")) == 1, book


def test_a_quarter_of_the_books_were_not_written_in_english(books: list[Book]) -> None:
    foreign = [book for book in books if "English" not in entities(book, "language")[0]]
    assert len(foreign) >= len(books) / 4


def test_descriptions_are_one_line_of_40_to_200_characters_and_unique(books: list[Book]) -> None:
    descriptions = [book["description"] for book in books]
    assert all(40 <= len(text) <= 200 and "\n" not in text for text in descriptions)
    assert len(set(descriptions)) == len(descriptions)


def test_each_tag_is_used_by_at_least_4_books_and_at_most_3_in_10(books: list[Book]) -> None:
    for book in books:
        assert 2 <= len(book["tags"]) <= 5 and len(set(book["tags"])) == len(book["tags"]), book
    uses = Counter(tag for book in books for tag in book["tags"])
    assert min(uses.values()) >= 4, uses
    assert max(uses.values()) <= 0.3 * len(books), uses


def test_year_is_in_range_and_ends_the_id(books: list[Book]) -> None:
    for book in books:
        year = book["attributes"]["year"]
        assert type(year) is int and -2200 <= year <= 1980, book
        ending = f"-{-year}bce" if year < 0 else f"-{year}"
        assert book["item_id"].endswith(ending), book
