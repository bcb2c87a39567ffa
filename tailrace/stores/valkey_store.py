"""The cluster store: Valkey or Redis, every key of a partition under one hash tag, every save one atomic script.

    {<prefix>:3}:claim      hash: `token`, the newest fencing token; `saves`, how many saves there have been
    {<prefix>:3}:profiles   hash: user id to encoded profile
    {<prefix>:3}:counters   hash: item id to encoded counters
    {<prefix>:3}:offsets    hash: stream to encoded offset

Profiles are fields of one hash, because listing a partition's users and removing a partition are then one command.

A server that was killed may come back without its last saves, or a replica may take over that never had them. So a
save also names the number of saves its writer has seen: a writer that knows more than the server is refused, and
loads the partition again. Tokens contain the server's clock, so a lost claim cannot make one token serve twice.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import msgspec
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from tailrace.errors import Fenced, StoreError
from tailrace.ids import ItemId, UserId
from tailrace.stores.store import Batch, Offset

_TIMEOUT_S = 10.0

_CLAIM = """
local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]
local held = tonumber(redis.call('HGET', KEYS[1], 'token') or 0)
local token = string.format('%.0f', math.max(held + 1, now))
redis.call('HSET', KEYS[1], 'token', token)
return {token, redis.call('HGET', KEYS[1], 'saves') or '0'}
"""

# ARGV: token, saves seen, then for profiles, counters and offsets: how many are removed, how many are set, the names
# to remove, and name and value of those to set. unpack() holds at most some 8,000 values, hence the steps.
_SAVE = """
local claim = redis.call('HMGET', KEYS[1], 'token', 'saves')
local token, saves = claim[1] or '0', claim[2] or '0'
if token ~= ARGV[1] then return {'fenced', token} end
if saves ~= ARGV[2] then return {'moved', saves} end
if #ARGV == 2 then return {'saved', saves} end
local at = 3
local function apply(command, key, length)
  local last = at + length - 1
  while at <= last do
    local upto = math.min(at + 3999, last)
    redis.call(command, key, unpack(ARGV, at, upto))
    at = upto + 1
  end
end
for index = 2, 4 do
  local removed, set = tonumber(ARGV[at]), tonumber(ARGV[at + 1])
  at = at + 2
  apply('HDEL', KEYS[index], removed)
  apply('HSET', KEYS[index], set * 2)
end
return {'saved', tostring(redis.call('HINCRBY', KEYS[1], 'saves', 1))}
"""

_encode = msgspec.msgpack.Encoder().encode
_decode_offset = msgspec.msgpack.Decoder(Offset).decode


class ValkeyStore:
    """Implements `tailrace.stores.store.Store` on the server at `url` (`redis://`, `rediss://` or `unix://`).

    Deployments that share a server differ in `prefix`. What survives the server's own death is what its persistence
    kept; the rest is folded again from Kafka. After a StoreError from `save` the writer loads the partition again.
    """

    def __init__(self, url: str, *, prefix: str = "tailrace") -> None:
        self._prefix = prefix
        try:
            self._client: Any = redis.Redis.from_url(
                url,
                decode_responses=False,
                socket_timeout=_TIMEOUT_S,
                socket_connect_timeout=_TIMEOUT_S,
                retry=Retry(NoBackoff(), 1),  # for a pooled connection that died idle; the caller does the rest
            )
        except ValueError as error:
            raise StoreError(f"`store.url` is not an address of a Valkey server: {error}") from error
        self._claim = self._client.register_script(_CLAIM)
        self._save = self._client.register_script(_SAVE)
        self._saves: dict[int, bytes] = {}  # by partition: the number of saves in what this writer has loaded

    def claim(self, partition: int) -> int:
        """Returns a new fencing token for the partition; every older token is refused from now on."""
        with self._coordinates(partition):
            token, self._saves[partition] = self._claim(keys=self._keys(partition)[:1])
        return int(token)

    def save(self, partition: int, token: int, batch: Batch) -> None:
        """Writes the whole batch in one script. Raises Fenced when `token` is not the newest.

        Raises StoreError when the server does not answer (the save may have happened), or has lost earlier saves.
        """
        arguments: list[bytes | str | int] = [token, self._saves.get(partition, b"0")]
        if batch.profiles or batch.counters or batch.offsets:
            _append(arguments, batch.profiles)
            _append(arguments, batch.counters)
            _append(arguments, {stream: _encode(offset) for stream, offset in batch.offsets.items()})
        with self._coordinates(partition):
            verdict, value = self._save(keys=self._keys(partition), args=arguments)
        if verdict == b"fenced":
            raise Fenced(partition, token, int(value))
        if verdict == b"moved":
            raise StoreError(
                f"partition {partition}: the store holds save {int(value)}, its writer knows of "
                f"{int(arguments[1])}; the writer must load the partition again"
            )
        self._saves[partition] = value

    def load_offsets(self, partition: int) -> dict[str, Offset]:
        """Returns the offset the partition's state reflects, by stream."""
        claim, _, _, offsets = self._keys(partition)
        with self._coordinates(partition), self._client.pipeline(transaction=True) as pipeline:
            saves, found = pipeline.hget(claim, "saves").hgetall(offsets).execute()
        self._saves[partition] = saves or b"0"
        return {stream.decode(): _decode_offset(value) for stream, value in found.items()}

    def load_counters(self, partition: int) -> dict[ItemId, bytes]:
        """Returns all the partition's counters, encoded."""
        with self._coordinates(partition):
            found = self._client.hgetall(self._keys(partition)[2])
        return {ItemId(item_id.decode()): value for item_id, value in found.items()}

    def load_profiles(self, partition: int, user_ids: Iterable[UserId]) -> dict[UserId, bytes]:
        """Returns those of the partition's profiles that exist, encoded, from one consistent snapshot."""
        wanted = list(user_ids)
        if not wanted:
            return {}
        with self._coordinates(partition):
            values = self._client.hmget(self._keys(partition)[1], wanted)
        return {user_id: value for user_id, value in zip(wanted, values, strict=True) if value is not None}

    def load_users(self, partition: int) -> list[UserId]:
        """Returns every user of the partition, in byte order."""
        with self._coordinates(partition):
            found = self._client.hkeys(self._keys(partition)[1])
        return [UserId(raw.decode()) for raw in sorted(found)]

    def close(self) -> None:
        """Closes the connections."""
        self._client.close()

    def _keys(self, partition: int) -> list[str]:
        tag = f"{{{self._prefix}:{partition}}}"
        return [f"{tag}:{name}" for name in ("claim", "profiles", "counters", "offsets")]

    @contextmanager
    def _coordinates(self, partition: int) -> Iterator[None]:
        """Turns what the client raises into a StoreError that says which partition."""
        try:
            yield
        except (redis.RedisError, OSError) as error:
            raise StoreError(f"partition {partition}: the Valkey store failed: {error}") from error


def _append(arguments: list[bytes | str | int], values: Mapping[Any, bytes | None]) -> None:
    removed = [name for name, value in values.items() if value is None]
    arguments += [len(removed), len(values) - len(removed), *removed]
    for name, value in values.items():
        if value is not None:
            arguments += (name, value)
