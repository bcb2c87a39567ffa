"""The embedded store: one LMDB environment per partition, so writers of different partitions never wait for each other.

Readers, in this process or another, take no lock and see a save as soon as it returned. An environment is one B+tree;
the first byte of a key says what it holds, which lets a reader open it while its writer is still creating it.

    t                 the newest fencing token
    o<stream>         its offset
    p<id>, c<id>      the profile of a user, the counters of an item
    P<hash>, C<hash>  the same for ids too long for a key: the value begins with the id and its length
"""

import struct
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

import lmdb
import msgspec

from tailrace.errors import Fenced, StoreError
from tailrace.ids import ItemId, UserId
from tailrace.stores.store import Batch, Offset

_TOKEN, _OFFSET, _PROFILE, _COUNTERS = b"t", b"o", b"p", b"c"
_MAX_ID_BYTES = 510  # LMDB's longest key is 511 bytes
_MAX_READERS = 1024  # read transactions at one moment, over all processes

_encode = msgspec.msgpack.Encoder().encode
_decode_offset = msgspec.msgpack.Decoder(Offset).decode


class _Environments:
    """The environments open in this process. LMDB forbids opening one twice, so stores on one folder share it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: dict[Path, tuple[Any, int]] = {}  # environment, number of its holders

    def acquire(self, folder: Path, map_size: int, sync: bool) -> Any:
        with self._lock:
            environment, holders = self._open.get(folder, (None, 0))
            if environment is None:
                folder.mkdir(parents=True, exist_ok=True)
                environment = lmdb.open(
                    str(folder), map_size=map_size, sync=sync, metasync=sync, max_readers=_MAX_READERS, max_spare_txns=4
                )
            self._open[folder] = (environment, holders + 1)
            return environment

    def release(self, folder: Path) -> None:
        with self._lock:
            environment, holders = self._open.pop(folder)
            if holders > 1:
                self._open[folder] = (environment, holders - 1)
            else:
                environment.close()


_environments = _Environments()


class LmdbStore:
    """Implements `tailrace.stores.store.Store` in the folder `path`; partition 3 is `path/00003`.

    `map_size_mb` bounds one partition's file, which is sparse and grows as needed. With `sync` every save is on disk
    when it returns. Without it, killed processes still lose nothing, but after a power cut a partition may have gone
    back in time or be damaged, and is then folded again from Kafka. Threads may share one store.
    """

    def __init__(self, path: Path, *, map_size_mb: int, sync: bool, read_only: bool = False) -> None:
        self._path = path.absolute()
        self._map_size_mb = map_size_mb
        self._sync = sync
        self._read_only = read_only
        self._lock = threading.Lock()
        self._held: dict[int, Any] = {}

    def claim(self, partition: int) -> int:
        """Returns a new fencing token for the partition; every older token is refused from now on."""
        environment = self._environment(partition, create=True)
        with self._coordinates(partition), environment.begin(write=True) as transaction:
            token = int(transaction.get(_TOKEN, b"0")) + 1
            transaction.put(_TOKEN, b"%d" % token)
        return token

    def save(self, partition: int, token: int, batch: Batch) -> None:
        """Writes the whole batch in one transaction. Raises Fenced when `token` is not the newest.

        Raises StoreError, with nothing changed, when the partition's file or the disk is full.
        """
        environment = self._environment(partition, create=True)
        with self._coordinates(partition):
            # Readers that were killed would pin the pages of their snapshot for ever, and the file would only grow.
            environment.reader_check()
            with environment.begin(write=True) as transaction:
                current = int(transaction.get(_TOKEN, b"0"))
                if token != current:
                    raise Fenced(partition, token, current)
                _write(transaction, _PROFILE, batch.profiles)
                _write(transaction, _COUNTERS, batch.counters)
                for stream, offset in batch.offsets.items():
                    transaction.put(_OFFSET + stream.encode(), _encode(offset))

    def load_offsets(self, partition: int) -> dict[str, Offset]:
        """Returns the offset the partition's state reflects, by stream."""
        with self._reading(partition) as transaction:
            return {key[1:].decode(): _decode_offset(value) for key, value in _scan(transaction, _OFFSET)}

    def load_counters(self, partition: int) -> dict[ItemId, bytes]:
        """Returns all the partition's counters, encoded."""
        with self._reading(partition) as transaction:
            counters = {ItemId(key[1:].decode()): value for key, value in _scan(transaction, _COUNTERS)}
            long_ids = (_split(value) for _, value in _scan(transaction, _COUNTERS.upper()))
            return counters | {ItemId(item_id.decode()): value for item_id, value in long_ids}

    def load_profiles(self, partition: int, user_ids: Iterable[UserId]) -> dict[UserId, bytes]:
        """Returns those of the partition's profiles that exist, encoded, from one consistent snapshot."""
        found: dict[UserId, bytes] = {}
        with self._reading(partition) as transaction:
            if transaction is None:
                return found
            for user_id in user_ids:
                raw = user_id.encode()
                value = transaction.get(_key(_PROFILE, raw))
                if value is not None:
                    found[user_id] = value if len(raw) <= _MAX_ID_BYTES else _split(value)[1]
        return found

    def load_users(self, partition: int) -> list[UserId]:
        """Returns every user of the partition, in byte order."""
        with self._reading(partition) as transaction:
            raw_ids = [key[1:] for key, _ in _scan(transaction, _PROFILE, values=False)]
            long_ids = [_split(value)[0] for _, value in _scan(transaction, _PROFILE.upper())]
        return [UserId(raw.decode()) for raw in (sorted(raw_ids + long_ids) if long_ids else raw_ids)]

    def close(self) -> None:
        """Closes the environments that no other store of this process holds open."""
        with self._lock:
            for partition in self._held:
                _environments.release(self._folder(partition))
            self._held.clear()

    def _folder(self, partition: int) -> Path:
        return self._path / f"{partition:05d}"

    def _environment(self, partition: int, *, create: bool) -> Any:
        """Returns the partition's environment, or None where it does not exist and is not to be created."""
        held = self._held.get(partition)
        if held is not None and not (create and self._read_only):
            return held
        if create and self._read_only:
            raise StoreError(f"partition {partition}: this store was opened to be read only")
        folder = self._folder(partition)
        with self._lock, self._coordinates(partition):
            if partition not in self._held and (create or (folder / "data.mdb").exists()):
                self._held[partition] = _environments.acquire(folder, self._map_size_mb << 20, self._sync)
            return self._held.get(partition)

    @contextmanager
    def _reading(self, partition: int) -> Iterator[Any]:
        """Gives one snapshot of the partition, or None where it was never claimed."""
        environment = self._environment(partition, create=False)
        with self._coordinates(partition):
            if environment is None:
                yield None
            else:
                with environment.begin() as transaction:
                    yield transaction

    @contextmanager
    def _coordinates(self, partition: int) -> Iterator[None]:
        """Turns what LMDB raises into a StoreError that says where, and what to do."""
        folder = self._folder(partition)
        try:
            yield
        except lmdb.MapFullError as error:
            raise StoreError(
                f"partition {partition}: {folder} is full at {self._map_size_mb} MiB; raise `store.map_size_mb` and "
                "restart the workers. Nothing of this save was written."
            ) from error
        except lmdb.MapResizedError as error:
            raise StoreError(
                f"partition {partition}: another process uses {folder} with a larger `store.map_size_mb`; "
                "restart this one with the same setting"
            ) from error
        except (lmdb.CorruptedError, lmdb.InvalidError, lmdb.PageNotFoundError) as error:
            raise StoreError(
                f"partition {partition}: {folder} is damaged ({error}); stop the workers and remove the folder, "
                "and the partition is folded again from Kafka"
            ) from error
        except (lmdb.Error, OSError) as error:
            raise StoreError(
                f"partition {partition}: {folder} cannot be used: {error}. Nothing of this step was written; "
                "check the disk's free space and health."
            ) from error


def _key(prefix: bytes, raw_id: bytes) -> bytes:
    return prefix + raw_id if len(raw_id) <= _MAX_ID_BYTES else prefix.upper() + sha256(raw_id).digest()


def _write(transaction: Any, prefix: bytes, values: Mapping[Any, bytes | None]) -> None:
    # In key order, neighbours share pages that are already at hand.
    for raw_id, value in sorted((name.encode(), value) for name, value in values.items()):
        key = _key(prefix, raw_id)
        if value is None:
            transaction.delete(key)
        elif len(raw_id) <= _MAX_ID_BYTES:
            transaction.put(key, value)
        else:
            transaction.put(key, struct.pack(">H", len(raw_id)) + raw_id + value)


def _split(value: bytes) -> tuple[bytes, bytes]:
    """Returns the id and the value of an entry whose id was too long to be its key."""
    (length,) = struct.unpack_from(">H", value)
    return value[2 : 2 + length], value[2 + length :]


def _scan(transaction: Any, prefix: bytes, *, values: bool = True) -> Iterator[tuple[bytes, bytes]]:
    """Gives the entries whose key begins with `prefix`, in byte order; without `values`, empty ones."""
    if transaction is None:
        return
    with transaction.cursor() as cursor:
        if not cursor.set_range(prefix):
            return
        for entry in cursor.iternext(keys=True, values=values):
            key, value = entry if values else (entry, b"")
            if not key.startswith(prefix):
                return
            yield key, value
