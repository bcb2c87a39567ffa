"""Keeps one replica's model current: swaps versions in place, and encodes items as they come and change.

One reference points at the model that serves. A swap loads the next one aside, and only then changes the reference:

1. Fetch the bundle and verify its checksums.
2. Open its sessions, and check that it takes the input we make.
3. Encode the catalogue with it, from the disk where it can.
4. Warm it up on recent requests.
5. Flip. Requests in flight finish on the old model, which then ends.

A bundle that fails in 1 to 4 changes nothing: the old model serves on, and status and log say why. It is tried again
when it is announced again, and at every look at the pointer as long as there is no old model.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import isfinite

import msgspec
import structlog

from services.bodies import Asked, ModelStatus, RankedAnswer, RecommendationRequest
from services.loaded_model import LoadedModel
from tailrace.catalogue import Catalogue
from tailrace.errors import BundleError, NotReady, TailraceError
from tailrace.events import ModelAnnouncement, decode
from tailrace.ids import ModelVersion, RequestId, UserId
from tailrace.registry import Registry
from tailrace.settings import Settings

log = structlog.get_logger()

_IDLE_S = 0.2  # between two looks at the catalogue, when nothing else wakes us
_POINTER_INTERVAL_S = 30.0  # an announcement may be lost with the process that was to send it
_SAVE_INTERVAL_S = 30.0
_MAX_RECENT = 8
_announcement_decoder = msgspec.json.Decoder(ModelAnnouncement)


class ModelSlot:
    """Holds the model that serves, and replaces it. Two threads: one encodes items, one swaps."""

    def __init__(
        self,
        settings: Settings,
        registry: Registry,
        catalogue: Catalogue,
        *,
        load: Callable[..., LoadedModel] = LoadedModel.load,
        items_read: Callable[[], bool],
        warm_up: Callable[[Asked, LoadedModel], RankedAnswer],
    ) -> None:
        """`items_read` says whether the catalogue holds what stood in its topic: no model serves half of one."""
        self._settings = settings
        self._registry = registry
        self._catalogue = catalogue
        self._load = load
        self._items_read = items_read
        self._warm_up = warm_up
        self._model: LoadedModel | None = None
        self._loading: ModelVersion | None = None
        self._refused: dict[ModelVersion, str] = {}
        self._swaps = 0
        self._recent: deque[Asked] = deque(maxlen=_MAX_RECENT)
        self._encoding = threading.Lock()  # held for a chunk of items
        self._reference = threading.Lock()  # held for an instant
        self._settled = threading.Event()
        self._stop = threading.Event()
        self._items_changed = threading.Event()
        self._look = threading.Event()
        self._threads = [
            threading.Thread(target=self._encode_items, name="encode-items", daemon=True),
            threading.Thread(target=self._follow_pointer, name="swap-model", daemon=True),
        ]

    def start(self) -> "ModelSlot":
        """Starts both threads; the first model comes from the registry's pointer."""
        for thread in self._threads:
            thread.start()
        return self

    def stop(self) -> None:
        """Stops both threads and retires the model."""
        self._stop.set()
        self._look.set()
        self._items_changed.set()
        for thread in self._threads:
            thread.join(timeout=10)
        if self._model is not None:
            self._model.retire()

    def wait(self, timeout_s: float) -> bool:
        """Returns whether a model serves, once the first has been loaded or refused, or after `timeout_s`."""
        self._settled.wait(timeout_s)
        return self._model is not None

    @contextmanager
    def lease(self) -> Iterator[LoadedModel]:
        """Holds the model that serves for one request. Raises NotReady before the first one is loaded."""
        with self._reference:
            model = self._model
            if model is None:
                why = "; ".join(f"{version}: {reason}" for version, reason in self._refused.items())
                raise NotReady(f"no model is loaded yet{f' ({why})' if why else ''}")
            model.hold()
        try:
            yield model
        finally:
            model.release()

    def note_request(self, asked: Asked) -> None:
        """Remembers a request for the next warm-up."""
        self._recent.append(asked)

    def note_item(self) -> None:
        """Wakes the encoder: the catalogue has changed."""
        self._items_changed.set()

    def apply_announcement(self, key: str, value: bytes | None, at_ms: int) -> None:
        """Takes a record of `models` (fits `table_reader.ApplyRecord`): the pointer has moved, so look at it."""
        if value is not None:
            version = decode(_announcement_decoder, value).version
            self._refused.pop(version, None)  # announced again: worth another try
            self._look.set()

    def status(self) -> ModelStatus:
        """Returns what is loaded, what is on its way, and what was refused."""
        model = self._model
        return ModelStatus(
            serving=None if model is None else model.version,
            precision=None if model is None else model.precision,
            loading=self._loading,
            refused=dict(self._refused),
            items=0 if model is None else model.encodings.num_ready,
            pending=0 if model is None else model.encodings.num_pending,
            waiting=0 if model is None else model.waiting,
            swaps=self._swaps,
        )

    # The swap.

    def _follow_pointer(self) -> None:
        while not self._items_read() and not self._stop.is_set():
            self._stop.wait(0.05)
        while not self._stop.is_set():
            self._look.clear()
            try:
                pointer = self._registry.pointer()
                wanted = None if pointer is None else pointer.champion
                if wanted is not None and self._wants(wanted):
                    self._swap(wanted)
            except (BundleError, OSError) as error:
                log.error("the registry's pointer cannot be read", error=str(error))
            self._settled.set()
            self._look.wait(_POINTER_INTERVAL_S)

    def _wants(self, version: ModelVersion) -> bool:
        return self._model is None or (self._model.version != version and version not in self._refused)

    def _swap(self, version: ModelVersion) -> None:
        started, model = time.monotonic(), None
        self._loading = version
        try:
            # 1. and 2. Fetch, verify, open, check.
            folder = self._registry.fetch(version, self._settings.path("cache") / "bundles")
            model = self._load(folder, version, self._settings)
            # 3. Encode the catalogue.
            while model.catch_up(self._catalogue) and not self._stop.is_set():
                pass
            # 4. Warm up.
            for asked in list(self._recent) or [_FIRST_REQUEST]:
                _require_sound(version, self._warm_up(asked, model))
        except Exception as error:  # whatever is wrong with a bundle must not end this thread
            self._refused[version] = str(error) if isinstance(error, TailraceError | OSError) else repr(error)
            serving = None if self._model is None else self._model.version
            log.exception("model refused; the old one serves on", version=version, serving=serving)
            if model is not None:
                model.retire()
            return
        finally:
            self._loading = None
        # 5. Flip. The encoding thread is between two chunks: only one thread at a time fills an encoding.
        with self._encoding, self._reference:
            old, self._model = self._model, model
        self._swaps += 1
        self._refused.pop(version, None)
        log.info("model serves", version=version, took_s=round(time.monotonic() - started, 2))
        if old is not None:
            old.retire()

    # Items.

    def _encode_items(self) -> None:
        save_at = time.monotonic() + _SAVE_INTERVAL_S
        while not self._stop.is_set():
            self._items_changed.wait(_IDLE_S)
            self._items_changed.clear()
            try:
                while self._encode_chunk() and not self._stop.is_set():
                    pass
            except TailraceError as error:
                log.error("items could not be encoded; trying again", error=str(error))
                self._stop.wait(1.0)
            if self._model is not None and time.monotonic() >= save_at:
                self._model.encodings.save()
                save_at = time.monotonic() + _SAVE_INTERVAL_S
        if self._model is not None:
            self._model.encodings.save()

    def _encode_chunk(self) -> bool:
        with self._encoding:
            return self._model is not None and self._model.catch_up(self._catalogue)


_FIRST_REQUEST = Asked(
    request_id=RequestId("warm-up"),
    request=RecommendationRequest(user_id=UserId("warm-up"), query="warm-up", dry_run=True),
    profile=None,
    now_ms=0,
    budget_s=0.0,
)


def _require_sound(version: ModelVersion, answer: RankedAnswer) -> None:
    if answer.degraded != "none" or not all(isfinite(item.score) for item in answer.items):
        raise BundleError(f"{version} could not answer a request it was warmed up on")
