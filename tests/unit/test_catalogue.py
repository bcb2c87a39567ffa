"""The table of items: what a record does to it, and what a reader gets."""

import threading
import time

import msgspec
import numpy as np
import pytest

from tailrace.catalogue import Catalogue
from tailrace.counter_columns import NEVER_MS, NOBODY
from tailrace.counters import HALF_LIVES_S, KINDS, MAX_TOUCHES, ItemCounters, apply_count, apply_covisit, apply_touch
from tailrace.counters import item_stats as stats_of
from tailrace.errors import InvalidRecord
from tailrace.events import encode
from tailrace.ids import ItemId
from tailrace.items import Fact, Item

NOW_MS = 1_700_000_000_000
HOUR_MS = 3_600_000
USERS = KINDS.index("users")


def item(name: str, *tags: str, **fields: object) -> Item:
    return msgspec.convert({"item_id": name, "title": name.title(), "tags": list(tags), **fields}, Item)


def announce(catalogue: Catalogue, *items: Item, at_ms: int = NOW_MS) -> None:
    for one in items:
        catalogue.apply_item(one.item_id, encode(one), at_ms)


def counted(users: int, at_ms: int, *, covisits: tuple[str, ...] = ()) -> ItemCounters:
    counters = ItemCounters()
    for number in range(users):
        apply_count(counters, "users", at_ms + number)
        apply_touch(counters, at_ms + number)
    for other in covisits:
        apply_covisit(counters, ItemId(other), at_ms)
    return counters


def publish(catalogue: Catalogue, name: str, partition: int, counters: ItemCounters) -> None:
    catalogue.apply_stats(f"{partition}:{name}", encode(stats_of(ItemId(name), partition, counters)), NOW_MS)


def users_of(catalogue: Catalogue, name: str, now_ms: int) -> list[float]:
    return list(catalogue.decayed_sums(catalogue.rows([ItemId(name)]), now_ms)[0, USERS])


def test_shares_of_partitions_add_up_as_if_one_partition_had_counted_all() -> None:
    catalogue, whole = Catalogue(), ItemCounters()
    announce(catalogue, item("a"))
    for partition, at_ms in ((0, NOW_MS - HOUR_MS), (1, NOW_MS - 5 * HOUR_MS), (7, NOW_MS)):
        publish(catalogue, "a", partition, counted(3, at_ms))
        for number in range(3):
            apply_count(whole, "users", at_ms + number)
    later_ms = NOW_MS + 2 * HOUR_MS
    held = whole.sums["users"]
    expected = [s * 2 ** (-(later_ms - held.at_ms) / (h * 1000)) for s, h in zip(held.sums, HALF_LIVES_S, strict=True)]
    assert users_of(catalogue, "a", later_ms) == pytest.approx(expected, rel=1e-5)
    assert catalogue.trend("users", 2, later_ms)[0] == pytest.approx(expected[2], rel=1e-5)


def test_a_newer_share_replaces_the_one_before_and_a_null_one_removes_it() -> None:
    catalogue = Catalogue()
    announce(catalogue, item("a"))
    publish(catalogue, "a", 3, counted(1, NOW_MS))
    publish(catalogue, "a", 3, counted(4, NOW_MS))
    assert users_of(catalogue, "a", NOW_MS + 4)[-1] == pytest.approx(4, rel=1e-3)
    catalogue.apply_stats("3:a", None, NOW_MS)
    assert users_of(catalogue, "a", NOW_MS) == [0.0] * len(HALF_LIVES_S)


def test_the_newest_touches_of_all_partitions_stand_newest_first() -> None:
    catalogue = Catalogue()
    announce(catalogue, item("a"))
    publish(catalogue, "a", 0, counted(6, NOW_MS))
    publish(catalogue, "a", 1, counted(6, NOW_MS + 100))
    held = catalogue.gather(catalogue.rows([ItemId("a")]), NOW_MS)
    newest = sorted([*range(NOW_MS, NOW_MS + 6), *range(NOW_MS + 100, NOW_MS + 106)], reverse=True)
    assert held.touches_ms_NT[0].tolist() == newest[:MAX_TOUCHES]
    assert held.first_ms_N[0] == NOW_MS


def test_the_newest_visitors_of_all_partitions_stand_newest_first() -> None:
    catalogue = Catalogue()
    announce(catalogue, item("a"), item("b"))
    for partition, visitors in enumerate(([(1, 7), (4, 9)], [(2, 7), (3, 8)])):
        publish(catalogue, "a", partition, ItemCounters(visitors=visitors))
    rows = catalogue.rows([ItemId("a"), ItemId("b")])
    assert catalogue.visitors(rows)[:, :5].tolist() == [[9, 8, 7, 7, NOBODY], [NOBODY] * 5]
    assert catalogue.gather(rows, NOW_MS).visits_ms_NV[0, :5].tolist() == [4, 3, 2, 1, NEVER_MS]
    catalogue.apply_item("a", None, NOW_MS)
    assert (catalogue.visitors(rows) == NOBODY).all()


def test_covisits_are_added_over_partitions_and_decay() -> None:
    catalogue = Catalogue()
    announce(catalogue, item("a"), item("b"))
    publish(catalogue, "a", 0, counted(1, NOW_MS, covisits=("b", "c")))
    publish(catalogue, "a", 1, counted(1, NOW_MS, covisits=("b",)))
    assert catalogue.covisits(ItemId("a"), NOW_MS) == {"b": 2.0, "c": 1.0}
    assert catalogue.covisits(ItemId("a"), NOW_MS + 7 * 24 * HOUR_MS)[ItemId("b")] == pytest.approx(1.0)
    publish(catalogue, "a", 1, counted(1, NOW_MS))
    assert catalogue.covisits(ItemId("a"), NOW_MS) == {"b": 1.0, "c": 1.0}


def test_counters_wait_for_their_item_but_no_more_than_allowed() -> None:
    catalogue = Catalogue(max_unannounced=2)
    for name in ("a", "b", "c"):
        publish(catalogue, name, 0, counted(2, NOW_MS))
    announce(catalogue, item("a"), item("c"))
    assert catalogue.forgotten == 1
    assert users_of(catalogue, "a", NOW_MS)[-1] == 0
    assert users_of(catalogue, "c", NOW_MS)[-1] == pytest.approx(2, rel=1e-3)


def test_an_item_is_as_old_as_it_says_or_else_as_its_first_sign_of_life() -> None:
    catalogue = Catalogue()
    announce(catalogue, item("dated", created_at=5_000), item("told"), item("touched"))
    publish(catalogue, "touched", 0, counted(1, NOW_MS - HOUR_MS))
    announce(catalogue, item("told", "changed"), at_ms=NOW_MS + HOUR_MS)
    created = catalogue.gather(catalogue.rows(catalogue.item_ids), NOW_MS).created_ms_N
    assert created.tolist() == [5_000, NOW_MS, NOW_MS - HOUR_MS]


def test_a_tombstone_removes_the_item_from_every_lookup_and_its_counters_survive_it() -> None:
    catalogue = Catalogue()
    announce(catalogue, item("a", "gothic"), item("b", "gothic"))
    publish(catalogue, "a", 0, counted(2, NOW_MS))
    catalogue.apply_item("a", None, NOW_MS)
    assert len(catalogue) == 1
    assert catalogue.item(ItemId("a")) is None
    assert catalogue.rows([ItemId("a"), ItemId("b")]).tolist() == catalogue.live_rows().tolist() == [1]
    assert catalogue.topic_rows("tag:gothic").tolist() == [1]
    assert catalogue.items_at([0]) == [None]
    assert catalogue.created_ms()[0] == NEVER_MS
    announce(catalogue, item("a"))
    assert users_of(catalogue, "a", NOW_MS)[-1] == pytest.approx(2, rel=1e-3)
    catalogue.apply_item("never-there", None, NOW_MS)


def test_a_freed_row_is_given_away_only_after_a_minute() -> None:
    catalogue = Catalogue()
    announce(catalogue, item("a"), item("b"))
    publish(catalogue, "a", 0, counted(2, NOW_MS))
    catalogue.apply_item("a", None, NOW_MS)
    announce(catalogue, item("soon"), at_ms=NOW_MS + 59_999)
    announce(catalogue, item("later"), at_ms=NOW_MS + 60_000)
    assert catalogue.row(ItemId("soon")) == 2
    assert catalogue.row(ItemId("later")) == 0
    assert users_of(catalogue, "later", NOW_MS) == [0.0] * len(HALF_LIVES_S)


def test_tags_and_entities_lead_to_rows_and_follow_changes() -> None:
    catalogue = Catalogue()
    announce(catalogue, item("a", "gothic", facts=[{"relation": "author", "entity": "Mary Shelley"}]), item("b", "war"))
    assert catalogue.topic_rows("author:Mary Shelley").tolist() == [0]
    announce(catalogue, item("a", "war"))
    assert catalogue.topic_rows("tag:war").tolist() == [0, 1]
    assert catalogue.topic_rows("tag:gothic").tolist() == catalogue.topic_rows("author:Mary Shelley").tolist() == []
    assert catalogue.topics_at([0, 1]) == [("tag:war",), ("tag:war",)]


def test_every_reader_learns_of_what_came_changed_or_went_once() -> None:
    catalogue = Catalogue()
    announce(catalogue, item("a"), item("b"))
    rows, version = catalogue.changed_since(0)
    assert rows.tolist() == [0, 1]
    announce(catalogue, item("a"))  # the same again
    publish(catalogue, "a", 0, counted(1, NOW_MS))
    assert catalogue.changed_since(version)[0].tolist() == []
    announce(catalogue, item("b", "war"))
    catalogue.apply_item("a", None, NOW_MS)
    assert catalogue.changed_since(version)[0].tolist() == [0, 1]
    assert catalogue.changed_since(0)[0].tolist() == [0, 1]


def test_rows_grow_without_losing_what_they_hold() -> None:
    catalogue = Catalogue()
    names = [f"item-{number}" for number in range(3000)]
    publish(catalogue, names[0], 0, counted(2, NOW_MS))
    announce(catalogue, *(item(name) for name in names))
    assert catalogue.num_rows == len(catalogue) == 3000
    assert users_of(catalogue, names[0], NOW_MS)[-1] == pytest.approx(2, rel=1e-3)
    assert catalogue.gather(catalogue.live_rows(), NOW_MS).created_ms_N.tolist() == [NOW_MS] * 3000


@pytest.mark.parametrize("key", ["a", "x:a", "1:", ":a"])
def test_a_stats_key_that_is_not_partition_and_item_is_refused(key: str) -> None:
    with pytest.raises(InvalidRecord, match="key"):
        Catalogue().apply_stats(key, encode(stats_of(ItemId("a"), 0, ItemCounters())), NOW_MS)


def test_records_that_do_not_fit_are_refused_and_change_nothing() -> None:
    catalogue = Catalogue()
    with pytest.raises(InvalidRecord, match=r"\$\.item_id"):
        catalogue.apply_item("another", encode(item("a")), NOW_MS)
    with pytest.raises(InvalidRecord, match="half-lives"):
        catalogue.apply_stats("0:a", b'{"item_id":"a","partition":0,"sums":{"users":[1,[1.0],1]}}', NOW_MS)
    with pytest.raises(InvalidRecord):
        catalogue.apply_item("a", b'{"item_id":"a"}', NOW_MS)
    assert len(catalogue) == 0


def test_readers_see_whole_rows_while_another_thread_writes() -> None:
    catalogue = Catalogue()
    names = [f"item-{number}" for number in range(50)]
    announce(catalogue, *(item(name, facts=[Fact("author", "x")]) for name in names))
    failures: list[str] = []
    finished = threading.Event()

    def read() -> None:
        while not finished.is_set():
            held = catalogue.gather(catalogue.live_rows(), NOW_MS)
            sums = held.sums_NKH[:, USERS]
            # Every writer counts `number` users at one moment, so all half-lives agree in every consistent row.
            if not np.allclose(sums, sums[:, :1], rtol=1e-3):
                failures.append("a row was seen half written")

    reader = threading.Thread(target=read)
    reader.start()
    deadline = time.monotonic() + 1.0
    number = 0
    while time.monotonic() < deadline:
        number += 1
        counters = ItemCounters()
        for _ in range(number % 7 + 1):
            apply_count(counters, "users", NOW_MS)
        publish(catalogue, names[number % 50], number % 3, counters)
        announce(catalogue, item(f"new-{number}"))
    finished.set()
    reader.join()
    assert not failures


@pytest.mark.parametrize("created_at", [2**63, 2**70, -(2**70)])
def test_date_that_no_calendar_has_does_no_harm(created_at: int) -> None:
    catalogue = Catalogue()
    catalogue.apply_item("a", msgspec.json.encode({"item_id": "a", "title": "A", "created_at": created_at}), NOW_MS)
    ages = NOW_MS - catalogue.gather(catalogue.rows([ItemId("a")]), NOW_MS).created_ms_N
    assert (ages > 0).tolist() == [created_at < 0]
