"""One owned partition: its claim, what is held of it in memory, and how a batch changes both memory and store.

Memory and store move together: a batch is folded here, then saved in one call. When the save fails, or is refused,
what was folded is thrown away by loading the partition again.
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import islice

from stream.admission import Erasure
from tailrace.counters import CounterTable, decode_counters, encode_counters
from tailrace.events import Interaction, UserEvent
from tailrace.fold import HasTopics, Outcome, Stream, fold_erasure, fold_event
from tailrace.ids import ItemId, UserId
from tailrace.profile import Profile, decode_profile, encode_profile
from tailrace.stores.store import Batch, Offset, Store


class OwnedPartition:
    """The profiles (a bounded cache), counters and offsets of one partition, under one fencing token."""

    def __init__(self, number: int, store: Store, max_profiles: int) -> None:
        self.number = number
        self.offsets: dict[str, Offset] = {}
        self.counters = CounterTable()
        self._store = store
        self._max_profiles = max_profiles
        self._token: int | None = None
        self._profiles: dict[UserId, Profile] = {}  # least recently used first
        self._dirty: set[UserId] = set()

    def load(self) -> None:
        """Claims the partition, the first time, and takes what the store has for what is. Raises StoreError."""
        if self._token is None:
            self._token = self._store.claim(self.number)
        self.offsets = self._store.load_offsets(self.number)
        stored = self._store.load_counters(self.number)
        self.counters = CounterTable({item_id: decode_counters(data) for item_id, data in stored.items()})
        self._profiles.clear()
        self._dirty.clear()

    def load_profiles(self, users: Iterable[UserId]) -> None:
        """Brings the profiles of `users` into memory with one read. Raises StoreError."""
        profiles = self._profiles
        missing: list[UserId] = []
        for user_id in users:
            held = profiles.pop(user_id, None)
            if held is None:
                missing.append(user_id)
            else:
                profiles[user_id] = held
        if not missing:
            return
        stored = self._store.load_profiles(self.number, missing)
        for user_id in missing:
            data = stored.get(user_id)
            profiles[user_id] = Profile(user_id) if data is None else decode_profile(data)

    def fold(self, stream: Stream, events: Sequence[UserEvent | Erasure], items: Mapping[ItemId, HasTopics]) -> int:
        """Folds one stream's events, in order, into loaded profiles and the counters; returns how many were repeats."""
        profiles, counters, dirty = self._profiles, self.counters, self._dirty
        repeated = 0
        for event in events:
            user_id = event.user_id
            if isinstance(event, Erasure):
                profiles[user_id] = fold_erasure(profiles[user_id], event.at_ms, (stream,))
                dirty.add(user_id)
                continue
            item = items.get(event.item_id) if isinstance(event, Interaction) else None
            outcome = fold_event(event, profiles[user_id], counters, item)
            if outcome is Outcome.APPLIED:
                dirty.add(user_id)
            elif outcome is Outcome.REPEATED:
                repeated += 1
        return repeated

    def save(self) -> set[ItemId]:
        """Saves what changed since the last save, with the offsets, in one write; returns the changed items.

        Raises StoreError, or Fenced when another worker has claimed the partition since.
        """
        assert self._token is not None, "a partition is loaded before it is saved"
        profiles, counters = self._profiles, self.counters
        batch = Batch(
            profiles={user_id: encode_profile(profiles[user_id]) for user_id in self._dirty},
            counters={item_id: encode_counters(counters.items[item_id]) for item_id in counters.dirty},
            offsets=self.offsets,
        )
        self._store.save(self.number, self._token, batch)
        changed, counters.dirty = counters.dirty, set()
        self._dirty.clear()
        excess = len(profiles) - self._max_profiles
        if excess > 0:
            for user_id in list(islice(profiles, excess)):
                del profiles[user_id]
        return changed

    def check_claim(self) -> None:
        """Returns if the partition is still ours. Raises Fenced, or StoreError when the store does not say."""
        assert self._token is not None, "a partition is loaded before its claim is checked"
        self._store.save(self.number, self._token, Batch())
