"""Each public format, read from files written here in that format."""

import gzip
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tailrace.errors import InvalidRecord, SettingsError
from tailrace.events import Click, Context, Impression, Rating, decode_event, encode
from tailrace.importers import IMPORTERS, Dataset, Reading, Row, SkipBad
from tailrace.importers.deskdrop import agent_device
from tailrace.importers.source import MAX_LISTED, EventIds, Held
from tailrace.items import Fact, Item, decode_item

CHROME = "Mozilla/5.0 (X11; Linux x86_64) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/48.0 Safari/537.36"


def write(path: Path, text: str) -> Path:
    """Writes the file, gzipped where its name says so, and returns its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path.parent


def read(format_name: str, path: Path, **options: Any) -> Dataset:
    return IMPORTERS[format_name](path, Reading(**options))


def events(dataset: Dataset) -> list[Row]:
    """Returns the events, having checked what every importer promises of them."""
    rows = list(dataset.events)
    assert [row.at_ms for row in rows] == sorted(row.at_ms for row in rows)
    ids = [(row.role, row.record.event_id) for row in rows if not isinstance(row.record, Item)]
    assert len(set(ids)) == len(rows)
    for row in rows:
        assert not isinstance(row.record, Item)
        assert row.key == row.record.user_id
        assert row.at_ms == row.record.at_ms
        assert dataset.first_ms <= row.at_ms <= dataset.last_ms
        assert decode_event(row.role, encode(row.record)) == row.record
    for row in dataset.items:
        assert isinstance(row.record, Item)
        assert row.key == row.record.item_id
        assert decode_item(encode(row.record)) == row.record
    return rows


def items(dataset: Dataset) -> dict[str, Item]:
    return {row.key: row.record for row in dataset.items if isinstance(row.record, Item)}


# -- MovieLens and MovieTweetings ----------------------------------------------------------------------------------

RATINGS = "userId,movieId,rating,timestamp\n7,10,3.5,1000\n3,20,5.0,500\n7,20,0.5,750\n"
MOVIES = 'movieId,title,genres\n10,"Lantern, The (1994)",Drama|Mystery\n20,Harbour,(no genres listed)\n'


@pytest.mark.parametrize("end", ["", ".gz"])
def test_movielens_csv_gives_ratings_in_time_order_on_the_half_star_scale(tmp_path: Path, end: str) -> None:
    write(tmp_path / f"ratings.csv{end}", RATINGS)
    write(tmp_path / f"movies.csv{end}", MOVIES)
    dataset = read("movielens", tmp_path)
    ratings = [row.record for row in events(dataset) if isinstance(row.record, Rating)]
    assert [(one.user_id, one.item_id, one.value, one.at_ms) for one in ratings] == [
        ("3", "20", 5.0, 500_000),
        ("7", "20", 0.5, 750_000),
        ("7", "10", 3.5, 1_000_000),
    ]
    assert {(one.scale_min, one.scale_max) for one in ratings} == {(0.5, 5.0)}
    film = items(dataset)["10"]
    assert (film.title, film.tags, film.attributes) == ("The Lantern", ["Drama", "Mystery"], {"year": 1994.0})
    assert film.created_ms == 757_382_400_000
    assert (items(dataset)["20"].title, items(dataset)["20"].tags) == ("Harbour", [])


def test_movielens_dat_of_whole_stars_is_on_the_scale_from_one_and_may_be_latin_1(tmp_path: Path) -> None:
    (tmp_path / "ratings.dat").write_text("1::10::4::100\n2::10::1::50\n")
    (tmp_path / "movies.dat").write_bytes("10::Café Noir (1962)::Crime\n".encode("latin-1"))
    dataset = read("movielens", tmp_path)
    ratings = [row.record for row in events(dataset) if isinstance(row.record, Rating)]
    assert [(one.value, one.scale_min, one.scale_max) for one in ratings] == [(1.0, 1.0, 5.0), (4.0, 1.0, 5.0)]
    assert items(dataset)["10"].title == "Café Noir"


def test_movielens_items_are_enriched_from_the_folder_above(tmp_path: Path) -> None:
    write(tmp_path / "ml" / "ratings.csv", RATINGS)
    write(tmp_path / "ml" / "movies.csv", MOVIES)
    known = {"movieId": 10, "overview": "A light.", "director": "A. B.", "actors": ["C. D."], "keywords": ["sea"]}
    write(tmp_path / "items.jsonl.gz", json.dumps(known) + "\n")
    film = items(read("movielens", tmp_path))["10"]
    assert film.description == "A light."
    assert film.facts == [Fact("director", "A. B."), Fact("actor", "C. D."), Fact("about", "sea")]


def test_movietweetings_ratings_are_on_the_scale_from_zero_to_ten(tmp_path: Path) -> None:
    write(tmp_path / "ratings.dat.gz", "1::0002844::10::1000\n2::0002844::0::900\n")
    write(tmp_path / "movies.dat.gz", "0002844::Der Schatten (1913)::Crime|Drama\n")
    dataset = read("movietweetings", tmp_path)
    ratings = [row.record for row in events(dataset) if isinstance(row.record, Rating)]
    assert [(one.value, one.share) for one in ratings] == [(0.0, 0.0), (10.0, 1.0)]
    assert items(dataset)["0002844"].tags == ["Crime", "Drama"]


# -- Deskdrop ------------------------------------------------------------------------------------------------------

INTERACTIONS = "timestamp,eventType,contentId,personId,sessionId,userAgent,userRegion,userCountry\n"


def interaction(
    at_s: int, kind: str, *, user: str = "u", session: str = "s1", agent: str = "", place: str = ","
) -> str:
    return f'{at_s},{kind},c1,{user},{session},"{agent}",{place}\n'


def test_deskdrop_kinds_become_actions(tmp_path: Path) -> None:
    kinds = ["VIEW", "LIKE", "BOOKMARK", "FOLLOW", "COMMENT CREATED"]
    rows = "".join(interaction(100 + number, kind) for number, kind in enumerate(kinds))
    write(tmp_path / "users_interactions.csv.gz", INTERACTIONS + rows)
    clicks = [row.record for row in events(read("deskdrop", tmp_path)) if isinstance(row.record, Click)]
    assert [click.action for click in clicks] == ["view", "like", "save", "save", "share"]


def test_deskdrop_context_is_sent_when_it_changes_or_has_expired_and_a_gap_is_no_change(tmp_path: Path) -> None:
    rows = [
        interaction(1000, "VIEW", agent=CHROME, place="SP,BR"),
        interaction(1010, "VIEW", agent=CHROME, place="SP,BR"),
        interaction(1020, "LIKE"),  # says nothing of agent or place: stays as it was in this session
        interaction(1030, "VIEW", agent="Android - Native Mobile App", place="SP,BR"),
        interaction(1040, "VIEW", session="s2"),
        interaction(1040 + 1801, "VIEW", session="s2"),
    ]
    write(tmp_path / "users_interactions.csv", INTERACTIONS + "".join(rows))
    found = events(read("deskdrop", tmp_path))
    contexts = [row.record for row in found if isinstance(row.record, Context)]
    assert [(one.at_ms, one.device, one.platform, one.country, one.session_id) for one in contexts] == [
        (1_000_000, "desktop", "linux", "BR", "s1"),
        (1_030_000, "mobile", "android", "BR", "s1"),
        (1_040_000, None, None, None, "s2"),
        (2_841_000, None, None, None, "s2"),
    ]
    assert [row.role for row in found[:2]] == ["contexts", "clicks"]


def test_deskdrop_rows_that_say_the_same_are_two_events_with_two_ids(tmp_path: Path) -> None:
    write(tmp_path / "users_interactions.csv", INTERACTIONS + interaction(100, "VIEW") * 2)
    assert len([row for row in events(read("deskdrop", tmp_path)) if row.role == "clicks"]) == 2


def test_deskdrop_article_is_available_since_its_first_event_or_when_it_was_shared(tmp_path: Path) -> None:
    write(tmp_path / "users_interactions.csv", INTERACTIONS + interaction(300, "VIEW") + interaction(200, "LIKE"))
    write(tmp_path / "titles.csv", 'contentId,title\nc1,"One, two"\nc2,Unseen\n')
    found = items(read("deskdrop", tmp_path))
    assert (found["c1"].title, found["c1"].created_ms, found["c2"].created_ms) == ("One, two", 200_000, None)

    articles = "timestamp,eventType,contentId,title,text,lang\n"
    articles += '50,CONTENT SHARED,c1,One,"Words, over\ntwo lines.",en\n60,CONTENT REMOVED,c1,One,,en\n'
    write(tmp_path / "shared_articles.csv", articles)
    found = items(read("deskdrop", tmp_path))
    assert list(found) == ["c1"]
    assert (found["c1"].created_ms, found["c1"].description, found["c1"].tags) == (
        50_000,
        "Words, over\ntwo lines.",
        ["en"],
    )


@pytest.mark.parametrize(
    ("agent", "expected"),
    [
        (CHROME, ("desktop", "linux")),
        ("Mozilla/5.0 (Windows NT 10.0; WOW64) Chrome/51.0", ("desktop", "windows")),
        ("Mozilla/5.0 (Macintosh; Intel Mac OS X 10_11_5)", ("desktop", "macos")),
        ("Mozilla/5.0 (Linux; Android 5.0; SM-G900I) Chrome/50.0 Mobile Safari/537.36", ("mobile", "android")),
        ("Mozilla/5.0 (Linux; Android 5.0; SM-T530) Chrome/50.0 Safari/537.36", ("tablet", "android")),
        ("Android - Native Mobile App", ("mobile", "android")),
        ("iOS - Native Mobile App", ("mobile", "ios")),
        ("Mozilla/5.0 (iPhone; CPU iPhone OS 9_3 like Mac OS X)", ("mobile", "ios")),
        ("Mozilla/5.0 (iPad; CPU OS 9_3 like Mac OS X)", ("tablet", "ios")),
        ("", (None, None)),
    ],
)
def test_user_agent_tells_device_and_platform(agent: str, expected: tuple[str | None, str | None]) -> None:
    assert agent_device(agent) == expected


# -- MIND ----------------------------------------------------------------------------------------------------------

ENTITIES = '[{"Label": "Ada L.", "Type": "P", "WikidataId": "Q1"}, {"Label": "Oslo", "Type": "G", "WikidataId": "Q2"}]'
NEWS = (
    f"N1\tsports\tsoccer\tA goal\tIn the last minute.\turl\t{ENTITIES}\t{ENTITIES}\n"
    "N2\tnews\tnews\tRain\t\turl\t[]\t\nN9\tnews\told\tLong ago\t\turl\t[]\t[]\n"
)
BEHAVIORS = (
    "2\tU1\t11/12/2019 2:14:46 PM\tN9 N1\tN1-0 N2-1\n"
    "1\tU1\t11/12/2019 2:00:00 AM\tN9 N1\tN2-1\n"
    "3\tU2\t11/13/2019 12:00:00 AM\t\tN1-0\n"
)
FIRST_SLATE_MS = 1_573_524_000_000  # 2019-11-12 02:00 UTC


def mind(folder: Path) -> Dataset:
    write(folder / "news.tsv", NEWS)
    write(folder / "behaviors.tsv.gz", BEHAVIORS)
    return read("mind", folder)


def test_mind_slates_are_impressions_and_their_clicks_point_at_them(tmp_path: Path) -> None:
    found = events(mind(tmp_path))
    slates = [row.record for row in found if isinstance(row.record, Impression)]
    assert [(one.user_id, [entry.item_id for entry in one.shown]) for one in slates] == [
        ("U1", ["N2"]),
        ("U1", ["N1", "N2"]),
        ("U2", ["N1"]),
    ]
    assert slates[0].at_ms == FIRST_SLATE_MS
    assert [str(one.event_id) for one in slates] == [str(one.request_id) for one in slates]
    assert {(entry.text, entry.features, entry.source) for one in slates for entry in one.shown} == {("", "", "mind")}
    clicks = [row.record for row in found if isinstance(row.record, Click) and row.record.request_id]
    assert [(one.request_id, one.item_id, one.position) for one in clicks] == [
        (slates[0].request_id, "N2", 0),
        (slates[1].request_id, "N2", 1),
    ]


def test_mind_history_is_clicked_once_per_user_hour_by_hour_before_the_first_slate(tmp_path: Path) -> None:
    past = [row.record for row in events(mind(tmp_path)) if isinstance(row.record, Click) and not row.record.request_id]
    hour_ms = 3_600_000
    assert [(one.user_id, one.item_id, one.at_ms) for one in past] == [
        ("U1", "N9", FIRST_SLATE_MS - 2 * hour_ms),
        ("U1", "N1", FIRST_SLATE_MS - hour_ms),
    ]


def test_mind_news_carry_categories_and_entities_and_are_available_since_first_shown(tmp_path: Path) -> None:
    write(tmp_path / "news_extra.tsv", "N1\tx\ty\tAnother title\nN3\tnews\tnews\tMore\n")
    found = items(mind(tmp_path))
    assert found["N1"].title == "A goal"
    assert found["N1"].tags == ["sports", "soccer"]
    assert found["N1"].facts == [Fact("person", "Ada L."), Fact("place", "Oslo")]
    assert (found["N2"].tags, found["N2"].created_ms) == (["news"], FIRST_SLATE_MS)
    assert found["N3"].title == "More"


# -- generic -------------------------------------------------------------------------------------------------------


def test_csv_columns_are_mapped_to_fields_and_rows_get_ids_that_do_not_change(tmp_path: Path) -> None:
    write(tmp_path / "log.csv.gz", "uid,sku,ts,kind\nu1,i1,200,like\nu1,i2,100,\nu1,i2,100,\n")
    mapping = {"user_id": "uid", "item_id": "sku", "occurred_at": "ts", "action": "kind"}

    def clicks() -> list[Click]:
        dataset = read("csv", tmp_path / "log.csv.gz", columns=mapping, epoch_ms=1000)
        return [row.record for row in events(dataset) if isinstance(row.record, Click)]

    assert [(one.item_id, one.at_ms, one.action) for one in clicks()] == [
        ("i2", 100_000, "click"),
        ("i2", 100_000, "click"),
        ("i1", 200_000, "like"),
    ]
    assert clicks() == clicks()


def test_csv_constants_fill_what_has_no_column(tmp_path: Path) -> None:
    write(tmp_path / "r.csv", "user_id,item_id,stars,occurred_at\nu,i,7,2024-05-01T12:00:00+02:00\n")
    dataset = read("csv", tmp_path / "r.csv", role="ratings", columns={"value": "stars"}, constants={"scale_max": "10"})
    rating = events(dataset)[0].record
    assert isinstance(rating, Rating)
    assert (rating.value, rating.scale_max, rating.at_ms) == (7.0, 10.0, 1_714_557_600_000)


def test_csv_items_take_lists_facts_and_attributes(tmp_path: Path) -> None:
    write(tmp_path / "items.csv", "id,name,tags,writer,price\n5,Tea,hot|green,A|B,3.5\n")
    mapping = {"item_id": "id", "title": "name", "fact.author": "writer", "attributes.price": "price"}
    item = items(read("csv", tmp_path / "items.csv", role="items", columns=mapping))["5"]
    assert (item.title, item.tags, item.facts) == ("Tea", ["hot", "green"], [Fact("author", "A"), Fact("author", "B")])
    assert "price" in item.attributes


def test_jsonl_events_are_taken_as_they_are_and_numbers_may_be_ids(tmp_path: Path) -> None:
    write(tmp_path / "e.jsonl", '{"event_id":"e7","user_id":42,"item_id":7,"occurred_at":5,"dwell_s":1.5}\n')
    click = events(read("jsonl", tmp_path / "e.jsonl"))[0].record
    assert isinstance(click, Click)
    assert (click.event_id, click.user_id, click.item_id, click.dwell_s) == ("e7", "42", "7", 1.5)


def test_mapping_of_an_unknown_field_or_role_is_a_settings_error(tmp_path: Path) -> None:
    write(tmp_path / "log.csv", "a\n1\n")
    with pytest.raises(SettingsError, match="no field 'userid'"):
        read("csv", tmp_path / "log.csv", columns={"userid": "a"})
    with pytest.raises(SettingsError, match="no topic"):
        read("csv", tmp_path / "log.csv", role="models")


# -- bad rows ------------------------------------------------------------------------------------------------------

BAD: list[tuple[str, str, Sequence[tuple[str, str]], str]] = [
    ("movielens", "ratings.csv", [("ratings.csv", RATINGS + "1,2,9.5,100\n")], r"ratings\.csv:5: .*outside its scale"),
    ("movielens", "ratings.csv", [("ratings.csv", RATINGS + "1,2,x,100\n")], r"ratings\.csv:5: .*'x'"),
    ("movielens", "ratings.csv", [("ratings.csv", RATINGS + "1,2,3.0,soon\n")], r"ratings\.csv:5: 'soon' is no time"),
    ("movielens", "ratings.csv", [("ratings.csv", RATINGS + "1,2\n")], r"ratings\.csv:5: 2 fields"),
    ("movielens", "ratings.csv", [("ratings.csv", RATINGS + ",2,3.0,100\n")], r"ratings\.csv:5: user has 0"),
    ("movielens", "movies.csv", [("ratings.csv", RATINGS), ("movies.csv", MOVIES + "30,,Drama\n")], r"movies\.csv:4: "),
    ("movietweetings", "ratings.dat", [("ratings.dat", "1::2::3\n")], r"ratings\.dat:1: 3 fields where 4"),
    (
        "deskdrop",
        "users_interactions.csv",
        [("users_interactions.csv", INTERACTIONS + interaction(1, "DANCE"))],
        r"users_interactions\.csv:2: eventType 'DANCE'",
    ),
    (
        "deskdrop",
        "users_interactions.csv",
        [("users_interactions.csv", INTERACTIONS + interaction(1, "VIEW") + '2,VIEW,"c1"x,u,s,,,\n')],
        r"users_interactions\.csv:3: ",
    ),
    ("mind", "b", [("news.tsv", NEWS), ("behaviors.tsv", BEHAVIORS + "4\tU\tlate\t\tN1-1\n")], r"behaviors\.tsv:4: "),
    (
        "mind",
        "b",
        [("news.tsv", NEWS), ("behaviors.tsv", BEHAVIORS + "4\tU\t11/12/2019 2:14:46 PM\t\tN1-7\n")],
        r"behaviors\.tsv:4: impression 'N1-7'",
    ),
    ("mind", "b", [("news.tsv", NEWS + "N4\ta\tb\tT\t\t\t{oops\t\n"), ("behaviors.tsv", BEHAVIORS)], r"news\.tsv:4: "),
]


@pytest.mark.parametrize(("format_name", "name", "files", "found"), BAD)
def test_bad_row_stops_the_import_naming_file_and_line_or_is_passed_over_and_listed(
    tmp_path: Path, format_name: str, name: str, files: Sequence[tuple[str, str]], found: str
) -> None:
    for file, text in files:
        write(tmp_path / file, text)
    with pytest.raises(InvalidRecord, match=found):
        read(format_name, tmp_path)

    bad = SkipBad()
    events(read(format_name, tmp_path, on_bad=bad))
    assert bad.count == 1
    assert re.search(found, bad.listed[0])


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("{oops", r"e\.jsonl:2: "),
        ('{"user_id":"u","item_id":"i"}', r"e\.jsonl:2: .*occurred_at"),
        ('{"user_id":"u","item_id":"i","occurred_at":"2024-01-01T00:00:00"}', r"e\.jsonl:2: .*no zone"),
        ('{"user_id":"u","item_id":"i","occurred_at":1,"action":"lick"}', r"e\.jsonl:2: .*'lick'"),
        ('{"user_id":"","item_id":"i","occurred_at":1}', r"e\.jsonl:2: .*user_id"),
    ],
)
def test_bad_json_line_names_its_line(tmp_path: Path, line: str, found: str) -> None:
    good = '{"user_id":"u","item_id":"i","occurred_at":1}'
    write(tmp_path / "e.jsonl", f"{good}\n{line}\n{good}\n")
    with pytest.raises(InvalidRecord, match=found):
        read("jsonl", tmp_path / "e.jsonl")
    bad = SkipBad()
    assert len(events(read("jsonl", tmp_path / "e.jsonl", on_bad=bad))) == 2
    assert bad.count == 1


def test_bytes_that_are_not_utf_8_are_one_bad_row(tmp_path: Path) -> None:
    (tmp_path / "users_interactions.csv").write_bytes(
        INTERACTIONS.encode() + b"1,VIEW,\xff,u,s,,,\n" + interaction(2, "VIEW").encode()
    )
    with pytest.raises(InvalidRecord, match=r"users_interactions\.csv:2: not UTF-8"):
        read("deskdrop", tmp_path)
    bad = SkipBad()
    assert len([row for row in events(read("deskdrop", tmp_path, on_bad=bad)) if row.role == "clicks"]) == 1


def test_truncated_gzip_stops_the_import_even_when_bad_rows_are_passed_over(tmp_path: Path) -> None:
    whole = gzip.compress((RATINGS + "1,2,3.0,100\n" * 5000).encode())
    (tmp_path / "ratings.csv.gz").write_bytes(whole[:-20])
    with pytest.raises(InvalidRecord, match=r"ratings\.csv\.gz:\d+: damaged gzip"):
        read("movielens", tmp_path, on_bad=SkipBad())


def test_missing_file_and_missing_column_are_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidRecord, match=r"has no users_interactions\.csv"):
        read("deskdrop", tmp_path)
    write(tmp_path / "ratings.csv", "userId,movieId,rating\n1,2,3.0\n")
    with pytest.raises(InvalidRecord, match=r"ratings\.csv:1: the header has no column 'timestamp'"):
        read("movielens", tmp_path)


def test_no_more_than_twenty_bad_rows_are_listed() -> None:
    bad = SkipBad()
    for number in range(50):
        bad(InvalidRecord("no", field=f"f:{number}"))
    assert (bad.count, len(bad.listed)) == (50, MAX_LISTED)


def test_empty_files_give_nothing(tmp_path: Path) -> None:
    write(tmp_path / "ratings.csv", "userId,movieId,rating,timestamp\n")
    assert events(read("movielens", tmp_path)) == []
    write(tmp_path / "empty.csv", "")
    assert events(read("csv", tmp_path / "empty.csv")) == []


# -- the parts -----------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.integers(0, 5), st.text(max_size=3))))
def test_held_rows_come_back_by_time_and_equal_times_in_the_order_they_came(rows: list[tuple[int, str]]) -> None:
    held = Held(str)
    for at_ms, text in rows:
        held.add(at_ms, text)
    assert list(held.in_order()) == sorted(rows, key=lambda row: row[0])


@given(st.lists(st.tuples(st.integers(0, 3), st.sampled_from("ab"))).map(lambda rows: sorted(rows, key=lambda r: r[0])))
def test_event_ids_are_unique_and_the_same_at_every_reading(rows: list[tuple[int, str]]) -> None:
    def give() -> list[str]:
        ids = EventIds("x")
        return [ids.give(at_ms, text) for at_ms, text in rows]

    first = give()
    assert len(set(first)) == len(rows)
    assert first == give()
