"""One suite for every store, then what only one of them promises."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import pytest
import redis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tailrace.errors import Fenced, SettingsError, StoreError
from tailrace.ids import ItemId, UserId
from tailrace.settings import load_settings
from tailrace.stores import open_store
from tailrace.stores.lmdb_store import LmdbStore
from tailrace.stores.memory import MemoryStore
from tailrace.stores.store import Batch, Offset, Store
from tailrace.stores.valkey_store import ValkeyStore
from tests.contract.store_process import ITEM, LEFT, RIGHT, numbered_batch, open_at
from tests.servers import start_valkey

DEADLINE_S = 60.0
_partitions = count(1)
U1, U2 = UserId("u1"), UserId("u2")


@dataclass(frozen=True)
class Place:
    """A store under test, and where a second process finds it."""

    kind: str
    where: str
    store: Store


@contextmanager
def opened_place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    where = str(tmp_path) if request.param == "lmdb" else request.getfixturevalue("valkey")
    store = open_at(request.param, where)
    yield Place(request.param, where, store)
    store.close()


@pytest.fixture(params=["memory", "lmdb", "valkey"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    if request.param == "memory":
        yield MemoryStore()
    else:
        with opened_place(request, tmp_path) as place:
            yield place.store


@pytest.fixture(params=["lmdb", "valkey"])
def shared_place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    """A place that a second process can share."""
    with opened_place(request, tmp_path) as place:
        yield place


@pytest.fixture
def partition() -> int:
    return next(_partitions)


@contextmanager
def second_process(step: str, kind: str, where: str, partition: int) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "tests.contract.store_process", step, kind, where, str(partition)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def wait_until_ready(process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"


def everything(store: Store, partition: int) -> tuple[dict[UserId, bytes], dict[ItemId, bytes], dict[str, Offset]]:
    profiles = store.load_profiles(partition, store.load_users(partition))
    return profiles, store.load_counters(partition), store.load_offsets(partition)


def test_a_partition_nobody_claimed_is_empty(store: Store, partition: int) -> None:
    assert everything(store, partition) == ({}, {}, {})
    assert store.load_users(partition) == []


def test_what_is_saved_is_loaded(store: Store, partition: int) -> None:
    token = store.claim(partition)
    offsets = {"clicks": Offset("topic-1", 17), "ratings": Offset("topic-2", 2**53)}
    store.save(partition, token, Batch(profiles={U1: b"one"}, counters={ItemId("i"): b"two"}, offsets=offsets))
    assert everything(store, partition) == ({U1: b"one"}, {ItemId("i"): b"two"}, offsets)


def test_a_later_save_replaces_what_it_names_and_leaves_the_rest(store: Store, partition: int) -> None:
    token = store.claim(partition)
    store.save(partition, token, Batch(profiles={U1: b"1", U2: b"2"}, offsets={"clicks": Offset("t", 1)}))
    store.save(partition, token, Batch(profiles={U2: b"3"}, offsets={"ratings": Offset("t", 9)}))
    profiles, _, offsets = everything(store, partition)
    assert profiles == {U1: b"1", U2: b"3"}
    assert offsets == {"clicks": Offset("t", 1), "ratings": Offset("t", 9)}


def test_none_removes(store: Store, partition: int) -> None:
    token = store.claim(partition)
    item = ItemId("i" * 600)
    store.save(partition, token, Batch(profiles={U1: b"1", U2: b"2"}, counters={ItemId("i"): b"3", item: b"4"}))
    gone = UserId("never there")
    store.save(partition, token, Batch(profiles={U1: None, gone: None}, counters={ItemId("i"): None, item: None}))
    assert everything(store, partition) == ({U2: b"2"}, {}, {})


def test_users_that_do_not_exist_are_absent(store: Store, partition: int) -> None:
    store.save(partition, store.claim(partition), Batch(profiles={U1: b""}))
    assert store.load_profiles(partition, [U1, U2]) == {U1: b""}
    assert store.load_profiles(partition, []) == {}


def test_partitions_do_not_see_each_other(store: Store, partition: int) -> None:
    other = next(_partitions)
    store.save(partition, store.claim(partition), numbered_batch(1))
    store.claim(other)
    assert everything(store, other) == ({}, {}, {})


def test_a_claim_fences_every_older_token(store: Store, partition: int) -> None:
    first, second = store.claim(partition), store.claim(partition)
    assert second > first
    with pytest.raises(Fenced):
        store.save(partition, first, Batch())
    third = store.claim(partition)
    for old in (first, second):
        with pytest.raises(Fenced):
            store.save(partition, old, numbered_batch(1))
    store.save(partition, third, numbered_batch(1))


def test_a_fenced_save_changes_nothing(store: Store, partition: int) -> None:
    old = store.claim(partition)
    store.save(partition, old, numbered_batch(1))
    store.claim(partition)
    with pytest.raises(Fenced):
        store.save(
            partition,
            old,
            Batch(profiles={LEFT: None, U1: b"new"}, counters={ITEM: b"new"}, offsets={"clicks": Offset("t", 2)}),
        )
    expected = numbered_batch(1)
    assert everything(store, partition) == (expected.profiles, expected.counters, expected.offsets)


def test_a_save_without_a_claim_is_fenced(store: Store, partition: int) -> None:
    with pytest.raises(Fenced):
        store.save(partition, 1, numbered_batch(1))
    assert everything(store, partition) == ({}, {}, {})


def test_claims_of_one_partition_do_not_fence_another(store: Store, partition: int) -> None:
    token = store.claim(partition)
    store.claim(next(_partitions))
    store.save(partition, token, numbered_batch(1))


@pytest.mark.parametrize(
    "name",
    [
        "a b",
        "ключ",
        "名前" * 128,
        "😀" * 256,
        "x" * 510,
        "x" * 511,
        "\x00",
        "a\x00b",
        "\x7f\x80ÿ",
        "{3}:profiles",
        "é" * 255,
    ],
)
def test_any_id_and_any_bytes_come_back(store: Store, partition: int, name: str) -> None:
    token = store.claim(partition)
    data = bytes(range(256)) * 3
    neighbours = {UserId(name + "!"): b"after", UserId(name[:-1] + "?"): b"beside"}
    profiles = neighbours | {UserId(name): data}
    store.save(partition, token, Batch(profiles=profiles, counters={ItemId(name): data}))
    assert store.load_profiles(partition, profiles) == profiles
    assert store.load_counters(partition) == {ItemId(name): data}
    assert store.load_users(partition) == sorted(profiles)
    store.save(partition, token, Batch(profiles={UserId(name): None}))
    assert store.load_profiles(partition, profiles) == neighbours


def test_users_come_in_byte_order(store: Store, partition: int) -> None:
    names = ["b", "a", "Z", "é", "z", "😀", "\ufffd", "aa", "x" * 600, "x", "y"]
    profiles = {UserId(name): b"" for name in names}
    store.save(partition, store.claim(partition), Batch(profiles=profiles))
    assert [user.encode() for user in store.load_users(partition)] == sorted(name.encode() for name in names)


def test_a_batch_of_twenty_thousand_profiles_is_one_save(store: Store, partition: int) -> None:
    token = store.claim(partition)
    profiles = {UserId(f"user-{index}"): b"%d" % index * 50 for index in range(20_000)}
    store.save(partition, token, Batch(profiles=profiles, offsets={"clicks": Offset("t", 20_000)}))
    assert store.load_profiles(partition, profiles) == profiles
    assert len(store.load_users(partition)) == 20_000
    store.save(partition, token, Batch(profiles=dict.fromkeys(profiles)))
    assert store.load_users(partition) == []


short_names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=4)
names = short_names | st.sampled_from(["L" * 600, "L" * 601])
values = st.none() | st.binary(max_size=30)
batches = st.builds(
    Batch,
    profiles=st.dictionaries(names.map(UserId), values, max_size=5),
    counters=st.dictionaries(names.map(ItemId), values, max_size=5),
    offsets=st.dictionaries(
        st.sampled_from(["clicks", "ratings"]), st.builds(Offset, names, st.integers(0, 2**53)), max_size=2
    ),
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(batches | st.just("claim") | st.just("fenced"), max_size=12))
def test_any_sequence_of_batches_equals_a_dict(store: Store, steps: list[Batch | str]) -> None:
    partition = next(_partitions)
    old, token = store.claim(partition), store.claim(partition)
    profiles: dict[UserId, bytes | None] = {}
    counters: dict[ItemId, bytes | None] = {}
    offsets: dict[str, Offset] = {}
    for step in steps:
        if step == "claim":
            old, token = token, store.claim(partition)
        elif step == "fenced":
            with pytest.raises(Fenced):
                store.save(partition, old, numbered_batch(1))
        else:
            assert isinstance(step, Batch)
            store.save(partition, token, step)
            profiles |= step.profiles
            counters |= step.counters
            offsets |= step.offsets
        found = everything(store, partition)
        assert found[0] == {user: data for user, data in profiles.items() if data is not None}
        assert found[1] == {item: data for item, data in counters.items() if data is not None}
        assert found[2] == offsets


def test_another_process_reads_a_save_at_once(shared_place: Place, partition: int) -> None:
    store = shared_place.store
    token = store.claim(partition)
    for number in (1, 2):
        store.save(partition, token, numbered_batch(number))
        with second_process("read", shared_place.kind, shared_place.where, partition) as process:
            found = json.loads(process.communicate(timeout=DEADLINE_S)[0])
        data = (b"%d" % number).hex()
        assert found == {
            "profiles": {"left": data, "right": data},
            "counters": {"item": data},
            "offsets": {"clicks": ["t", number]},
        }


def test_a_reader_never_sees_half_a_save(shared_place: Place, partition: int) -> None:
    store = shared_place.store
    seen: set[int] = set()
    deadline = time.monotonic() + DEADLINE_S
    with second_process("write", shared_place.kind, shared_place.where, partition) as process:
        wait_until_ready(process)
        while len(seen) < 200 and time.monotonic() < deadline:
            before = store.load_offsets(partition)
            profiles = store.load_profiles(partition, [LEFT, RIGHT])
            after = store.load_offsets(partition)
            if not before:
                continue
            assert profiles[LEFT] == profiles[RIGHT]
            assert before["clicks"].next_offset <= int(profiles[LEFT]) <= after["clicks"].next_offset
            seen.add(int(profiles[LEFT]))
    assert len(seen) >= 200


def test_a_killed_writer_leaves_whole_saves_only(shared_place: Place, partition: int) -> None:
    store = shared_place.store
    for _ in range(5):
        with second_process("write", shared_place.kind, shared_place.where, partition) as process:
            wait_until_ready(process)
            wait_for_another_number(store, partition)
        token = store.claim(partition)  # from here on nothing of the dead writer can still arrive
        profiles, counters, offsets = everything(store, partition)
        expected = numbered_batch(offsets["clicks"].next_offset)
        assert (profiles, counters) == (expected.profiles, expected.counters)
        store.save(partition, token, numbered_batch(0))


def number_in(store: Store, partition: int) -> int | None:
    offset = store.load_offsets(partition).get("clicks")
    return None if offset is None else offset.next_offset


def wait_for_another_number(store: Store, partition: int) -> None:
    deadline = time.monotonic() + DEADLINE_S
    before = number_in(store, partition)
    while number_in(store, partition) == before:
        assert time.monotonic() < deadline


# LMDB


def test_lmdb_reading_creates_no_file(tmp_path: Path) -> None:
    store = LmdbStore(tmp_path / "store", map_size_mb=1, sync=False)
    assert store.load_offsets(0) == {}
    assert not (tmp_path / "store").exists()


def test_lmdb_stores_of_one_process_share_an_environment(tmp_path: Path) -> None:
    one, two = (LmdbStore(tmp_path, map_size_mb=1, sync=False) for _ in range(2))
    old = one.claim(0)
    one.save(0, old, numbered_batch(1))
    assert two.load_users(0) == [LEFT, RIGHT]
    two.claim(0)
    two.close()
    with pytest.raises(Fenced):
        one.save(0, old, numbered_batch(2))
    one.close()


def test_lmdb_opened_to_be_read_refuses_to_write(tmp_path: Path) -> None:
    writer = LmdbStore(tmp_path, map_size_mb=1, sync=False)
    reader = LmdbStore(tmp_path, map_size_mb=1, sync=False, read_only=True)
    token = writer.claim(0)
    writer.save(0, token, numbered_batch(1))
    assert reader.load_users(0) == [LEFT, RIGHT]
    with pytest.raises(StoreError, match="read only"):
        reader.save(0, token, numbered_batch(2))
    with pytest.raises(StoreError, match="read only"):
        reader.claim(0)


@pytest.mark.parametrize("sync", [True, False])
def test_lmdb_full_map_says_what_to_do_and_changes_nothing(tmp_path: Path, sync: bool) -> None:
    store = LmdbStore(tmp_path, map_size_mb=1, sync=sync)
    token = store.claim(7)
    store.save(7, token, numbered_batch(1))
    before = everything(store, 7)
    too_much = {UserId(f"u{index}"): bytes(2000) for index in range(1000)}
    with pytest.raises(StoreError, match=r"partition 7.*store\.map_size_mb"):
        store.save(7, token, Batch(profiles=too_much | {LEFT: None}, offsets={"clicks": Offset("t", 2)}))
    assert everything(store, 7) == before
    store.save(7, token, numbered_batch(2))
    assert number_in(store, 7) == 2
    store.close()
    larger = LmdbStore(tmp_path, map_size_mb=16, sync=sync)
    larger.save(7, token, Batch(profiles=too_much))
    assert len(larger.load_users(7)) == 1002
    larger.close()


def test_lmdb_full_disk_refuses_the_save_and_changes_nothing(tmp_path: Path, partition: int) -> None:
    with second_process("fill", "lmdb", str(tmp_path), partition) as process:
        found = json.loads(process.communicate(timeout=DEADLINE_S)[0])
    assert "disk" in found["refused"]
    assert found["unchanged"]
    assert found["goes_on"]


def test_lmdb_snapshot_of_a_killed_reader_does_not_make_the_file_grow(tmp_path: Path, partition: int) -> None:
    store = LmdbStore(tmp_path, map_size_mb=256, sync=False)
    token = store.claim(partition)
    with second_process("hold", "lmdb", str(tmp_path), partition) as process:
        wait_until_ready(process)
        process.kill()
        process.wait()
        for _ in range(300):
            store.save(partition, token, Batch(profiles={U1: bytes(100_000)}))
    assert (tmp_path / f"{partition:05d}" / "data.mdb").stat().st_size < 3_000_000
    store.close()


def test_lmdb_damaged_file_is_named_in_the_error(tmp_path: Path) -> None:
    (tmp_path / "00004").mkdir()
    (tmp_path / "00004" / "data.mdb").write_bytes(b"not an environment" * 1000)
    store = LmdbStore(tmp_path, map_size_mb=1, sync=False)
    with pytest.raises(StoreError, match=r"00004.*damaged"):
        store.load_offsets(4)


# Valkey


def test_valkey_that_went_away_is_a_store_error_and_one_that_came_back_is_used(tmp_path: Path) -> None:
    server = start_valkey(tmp_path, append_only=True)
    store = ValkeyStore(server.url)
    token = store.claim(0)
    store.save(0, token, numbered_batch(1))
    server.kill()
    with pytest.raises(StoreError, match="partition 0"):
        store.save(0, token, numbered_batch(2))
    with pytest.raises(StoreError):
        store.load_profiles(0, [LEFT])
    server = start_valkey(tmp_path, append_only=True, port=server.port)
    try:
        assert number_in(store, 0) == 1
        store.save(0, token, numbered_batch(2))
        assert number_in(store, 0) == 2
    finally:
        server.stop()


def test_valkey_that_lost_saves_refuses_its_writer_until_it_has_loaded_again(valkey: str, partition: int) -> None:
    store = ValkeyStore(valkey)
    keys = [f"{{tailrace:{partition}}}:{name}" for name in ("claim", "profiles", "counters", "offsets")]
    token = store.claim(partition)
    store.save(partition, token, numbered_batch(1))
    with redis.Redis.from_url(valkey) as client:
        for key in keys:
            client.copy(key, key + ":older")
        store.save(partition, token, numbered_batch(2))
        for key in keys:
            client.rename(key + ":older", key)
    with pytest.raises(StoreError, match="load the partition again"):
        store.save(partition, token, Batch(offsets={"clicks": Offset("t", 3)}))
    assert number_in(store, partition) == 1
    store.save(partition, token, numbered_batch(2))
    assert everything(store, partition)[0] == numbered_batch(2).profiles


def test_valkey_that_lost_everything_fences_its_writer(valkey: str, partition: int) -> None:
    store = ValkeyStore(valkey)
    token = store.claim(partition)
    store.save(partition, token, numbered_batch(1))
    with redis.Redis.from_url(valkey) as client:
        client.delete(*client.keys(f"{{tailrace:{partition}}}:*"))
    with pytest.raises(Fenced):
        store.save(partition, token, numbered_batch(2))
    assert store.claim(partition) > token


def test_valkey_that_forgot_its_scripts_is_told_them_again(valkey: str, partition: int) -> None:
    store = ValkeyStore(valkey)
    token = store.claim(partition)
    with redis.Redis.from_url(valkey) as client:
        client.script_flush()
    store.save(partition, token, numbered_batch(1))
    assert number_in(store, partition) == 1


def test_valkey_keeps_a_partition_under_one_hash_tag(valkey: str, partition: int) -> None:
    store = ValkeyStore(valkey, prefix="shop-tailrace")
    store.save(partition, store.claim(partition), numbered_batch(1))
    with redis.Redis.from_url(valkey) as client:
        found = client.keys("{shop-tailrace:*")
        assert len(found) == 4
        assert {key.split(b"}")[0] for key in found} == {b"{shop-tailrace:%d" % partition}


# open_store


def test_open_store_opens_what_the_settings_name(tmp_path: Path, valkey: str) -> None:
    assert isinstance(open_store(load_settings(environ={}, store={"kind": "memory"})), MemoryStore)
    lmdb_store = open_store(load_settings(environ={}, data_dir=str(tmp_path)))
    lmdb_store.claim(3)
    assert (tmp_path / "store" / "00003" / "data.mdb").exists()
    lmdb_store.close()
    valkey_settings = load_settings(environ={}, store={"kind": "valkey", "url": valkey}, kafka={"topic_prefix": "x-"})
    assert open_store(valkey_settings).load_users(0) == []


def test_open_store_without_an_address_or_with_a_wrong_one_says_so() -> None:
    with pytest.raises(SettingsError, match=r"store\.url"):
        open_store(load_settings(environ={}, store={"kind": "valkey"}))
    with pytest.raises(StoreError, match=r"store\.url"):
        open_store(load_settings(environ={}, store={"kind": "valkey", "url": "nowhere"}))


def test_open_store_without_the_redis_package_names_the_extra() -> None:
    script = """
import sys
sys.modules["redis"] = None
from tailrace.errors import SettingsError
from tailrace.settings import load_settings
from tailrace.stores import open_store
try:
    open_store(load_settings(environ={}, store={"kind": "valkey", "url": "redis://127.0.0.1:1/0"}))
except SettingsError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60)
    assert "tailrace[redis]" in done.stdout
