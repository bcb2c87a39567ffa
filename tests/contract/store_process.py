"""A second process on a store, for the contract suite.

    python -m tests.contract.store_process STEP KIND WHERE PARTITION

`read` prints the partition as JSON; `write` saves 1, 2, 3, … until it is killed; `hold` keeps a snapshot open until
it is killed; `fill` saves on a disk that fills up, and prints what came of it.
"""

import json
import resource
import sys
from collections.abc import Iterator
from itertools import count
from pathlib import Path

from tailrace.errors import StoreError
from tailrace.ids import ItemId, UserId
from tailrace.stores.lmdb_store import LmdbStore
from tailrace.stores.store import Batch, Offset, Store
from tailrace.stores.valkey_store import ValkeyStore

LEFT, RIGHT, ITEM = UserId("left"), UserId("right"), ItemId("item")


def open_at(kind: str, where: str) -> Store:
    """Returns the store of `kind` at a folder or URL, with a small map."""
    if kind == "lmdb":
        return LmdbStore(Path(where), map_size_mb=256, sync=False)
    return ValkeyStore(where)


def numbered_batch(number: int) -> Batch:
    """Returns a batch whose every part says `number`."""
    data = b"%d" % number
    return Batch(profiles={LEFT: data, RIGHT: data}, counters={ITEM: data}, offsets={"clicks": Offset("t", number)})


def _read(store: Store, partition: int) -> None:
    users = store.load_users(partition)
    found = {
        "profiles": {user: data.hex() for user, data in store.load_profiles(partition, users).items()},
        "counters": {item: data.hex() for item, data in store.load_counters(partition).items()},
        "offsets": {name: [at.topic_id, at.next_offset] for name, at in store.load_offsets(partition).items()},
    }
    print(json.dumps(found))


def _write(store: Store, partition: int) -> None:
    token = store.claim(partition)
    print("ready", flush=True)
    for number in count(1):
        store.save(partition, token, numbered_batch(number))


def _hold(store: Store, partition: int) -> None:
    def users() -> Iterator[UserId]:
        yield LEFT
        print("ready", flush=True)
        sys.stdin.read()

    store.load_profiles(partition, users())


def _fill(store: Store, partition: int) -> None:
    token = store.claim(partition)
    store.save(partition, token, numbered_batch(1))
    # What a full disk looks like to a process: writes beyond this fail.
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    refused = None
    try:
        big = Batch(
            profiles={LEFT: b"2", RIGHT: None} | {UserId(f"u{index}"): bytes(2000) for index in range(2000)},
            offsets={"clicks": Offset("t", 2)},
        )
        store.save(partition, token, big)
    except StoreError as error:
        refused = str(error)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    unchanged = (
        store.load_users(partition) == [LEFT, RIGHT]
        and store.load_profiles(partition, [LEFT, RIGHT]) == numbered_batch(1).profiles
        and store.load_offsets(partition)["clicks"].next_offset == 1
    )
    store.save(partition, token, numbered_batch(3))
    goes_on = store.load_offsets(partition)["clicks"].next_offset == 3
    print(json.dumps({"refused": refused, "unchanged": unchanged, "goes_on": goes_on}))


if __name__ == "__main__":
    _, step, kind, where, partition = sys.argv
    {"read": _read, "write": _write, "hold": _hold, "fill": _fill}[step](open_at(kind, where), int(partition))
