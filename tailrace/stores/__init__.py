"""The profile stores, and the one place that chooses among them."""

from tailrace.errors import SettingsError
from tailrace.settings import Settings
from tailrace.stores.store import Store


def open_store(settings: Settings, *, read_only: bool = False) -> Store:
    """Returns the store that `settings.store` names. Nothing is written before the first claim.

    A `read_only` LMDB store refuses to claim and to save. Each call with kind `memory` gives a new, empty store.
    Raises SettingsError when the store's package or its address is missing, StoreError when it does not open.
    """
    store = settings.store
    match store.kind:
        case "memory":
            from tailrace.stores.memory import MemoryStore

            return MemoryStore()
        case "lmdb":
            from tailrace.stores.lmdb_store import LmdbStore

            return LmdbStore(
                settings.path(store.path), map_size_mb=store.map_size_mb, sync=store.sync, read_only=read_only
            )
        case "valkey":
            if not store.url:
                raise SettingsError("`store.url` is empty: a valkey store needs one, such as redis://127.0.0.1:6379/0")
            try:
                from tailrace.stores.valkey_store import ValkeyStore
            except ModuleNotFoundError as error:
                raise SettingsError(
                    "`store.kind` is valkey, but its client is not installed: pip install 'tailrace[redis]'"
                ) from error
            return ValkeyStore(store.url, prefix=settings.kafka.topic_prefix + "tailrace")
