"""Keeps one replica's models current: follows the registry's pointer, and encodes items as they come and change.

One reference points at the arrangement that serves: the champion, and a canary where there is one. The next version is
loaded aside (`load_aside.py`), giving way to what serves and sharing what the two have in common (`parts.py`), and only
then the reference changes. Requests in flight finish on the model they began with, which then ends. A canary that
becomes the champion is loaded already; one that is rolled back leaves at once.

A bundle that is refused changes nothing: the old models serve on, and status and log say why. It is tried again when
it is announced again, and at every look at the pointer as long as nothing serves.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any
from uuid import uuid4

import msgspec
import structlog

from services.arrangement import Arrangement, arrange, missing_version
from services.aside import Aside
from services.bodies import Asked, ModelStatus
from services.load_aside import WarmUp, load_aside
from services.loaded_model import LoadedModel
from services.parts import Parts
from services.tally import VersionTally
from tailrace.bundle import Bundle
from tailrace.catalogue import Catalogue
from tailrace.errors import BundleError, NotReady, TailraceError
from tailrace.events import ModelAnnouncement, decode
from tailrace.ids import ModelVersion, UserId
from tailrace.pointer import Pointer
from tailrace.registry import Registry
from tailrace.settings import Settings

log = structlog.get_logger()

_IDLE_S = 0.2  # between two looks at the catalogue, when nothing else wakes us
_POINTER_INTERVAL_S = 30.0  # an announcement may be lost with the process that was to send it
_SAVE_INTERVAL_S = 30.0
_MAX_RECENT = 4
_MAX_REMEMBERED = 8  # refusals, and tallies of retired models: enough to look at, and never more
_announcement_decoder = msgspec.json.Decoder(ModelAnnouncement)


class ModelSlot:
    """Holds the models that serve, and replaces them. Two threads: one encodes items, one swaps."""

    def __init__(
        self,
        settings: Settings,
        registry: Registry,
        catalogue: Catalogue,
        *,
        load: Callable[..., LoadedModel] = LoadedModel.open,
        items_read: Callable[[], bool],
        warm_up: WarmUp,
    ) -> None:
        """`items_read` says whether the catalogue holds what stood in its topic: no model serves half of one."""
        self._settings = settings
        self._registry = registry
        self._catalogue = catalogue
        self._load = load
        self._items_read = items_read
        self._warm_up = warm_up
        self._replica = uuid4().hex[:8]
        self._serving: Arrangement | None = None
        self._aside: LoadedModel | None = None  # loaded, and not yet arranged
        self._parts = Parts()
        self._work_aside = Aside(calm=lambda: not any(model.in_use for model in self._models()))
        self._loading: ModelVersion | None = None
        self._refused: dict[ModelVersion, str] = {}
        self._tallies: dict[ModelVersion, VersionTally] = {}
        self._swaps = 0
        self._recent: deque[Asked] = deque(maxlen=_MAX_RECENT)
        self._reference = threading.Lock()  # held for an instant
        self._settled = threading.Event()
        self._stop = threading.Event()
        self._items_changed = threading.Event()
        self._save_at = 0.0  # monotonic seconds
        self._look = threading.Event()
        self._threads = [
            threading.Thread(target=self._encode_items, name="encode-items", daemon=True),
            threading.Thread(target=self._follow_pointer, name="swap-model", daemon=True),
        ]

    def start(self) -> "ModelSlot":
        """Starts both threads; the first models come from the registry's pointer."""
        for thread in self._threads:
            thread.start()
        return self

    def stop(self) -> None:
        """Stops both threads, if they run, and retires the models."""
        self._stop.set()
        self._look.set()
        self._items_changed.set()
        for thread in self._threads:
            if thread.is_alive():  # neither is where nobody started them
                thread.join(timeout=10)
        for model in (*self._models(), self._aside):
            if model is not None:
                model.retire()
        self._work_aside.close()

    def wait(self, timeout_s: float) -> bool:
        """Returns whether a model serves, once the first has been loaded or refused, or after `timeout_s`."""
        self._settled.wait(timeout_s)
        return self._serving is not None

    @contextmanager
    def lease(self, user_id: UserId | None = None) -> Iterator[LoadedModel]:
        """Holds the user's model for one request; without a user, the champion. Raises NotReady before the first."""
        with self._reference:
            if self._serving is None:
                why = "; ".join(f"{version}: {reason}" for version, reason in self._refused.items())
                raise NotReady(f"no model is loaded yet{f' ({why})' if why else ''}")
            model = self._serving.model_for(user_id)
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
            announced = decode(_announcement_decoder, value)
            for version in (announced.version, announced.canary):
                if version is not None:
                    self._refused.pop(version, None)  # announced again: worth another try
            self._look.set()

    def status(self) -> ModelStatus:
        """Returns what is loaded and how it does, what is on its way, and what was refused."""
        serving, models = self._serving, self._models()
        champion = None if serving is None else serving.champion
        canary = None if serving is None else serving.canary
        return ModelStatus(
            replica=self._replica,
            serving=None if champion is None else champion.version,
            canary=None if canary is None else canary.version,
            precision=None if champion is None else champion.precision,
            loading=self._loading,
            refused=dict(self._refused),
            items=min((model.encodings.num_ready for model in models), default=0),
            pending=max((model.encodings.num_pending for model in models), default=0),
            waiting=sum(model.waiting for model in models),
            swaps=self._swaps,
            versions={version: tally.stats() for version, tally in list(self._tallies.items())},
        )

    def _models(self) -> tuple[LoadedModel, ...]:
        serving = self._serving
        return () if serving is None else serving.models()

    # The swap.

    def _follow_pointer(self) -> None:
        while not self._items_read() and not self._stop.is_set():
            self._stop.wait(0.05)
        while not self._stop.is_set():
            self._look.clear()
            try:
                if self._follow_once():
                    continue  # loading took its time, and the pointer may have moved meanwhile
            except (BundleError, OSError) as error:
                log.error("the registry's pointer cannot be read", error=str(error))
            self._settled.set()
            self._look.wait(_POINTER_INTERVAL_S)

    def _follow_once(self) -> bool:
        """Returns whether a model was loaded, and is to be arranged next."""
        pointer = self._registry.pointer()
        if pointer is None:
            return False
        # 1. What is loaded serves as the pointer says, at once.
        self._arrange(pointer)
        # 2. What is missing is loaded aside.
        missing = missing_version(pointer, self._serving)
        if missing is None or (self._serving is not None and missing in self._refused):
            return False
        self._aside = self._load_aside(missing)
        return self._aside is not None

    def _arrange(self, pointer: Pointer) -> None:
        before, aside = self._serving, self._aside
        held = (*self._models(), *(() if aside is None else (aside,)))
        planned = arrange(pointer, before, held)
        for model in () if planned is None else planned.models():
            model.start()
        with self._reference:
            self._serving, self._aside = planned, None
        serving, served = self._models(), () if before is None else before.models()
        if planned is not None and serving != served:
            self._swaps += before is None or planned.champion is not before.champion
            self._tallies |= {model.version: model.tally for model in serving}
            _forget_oldest(self._tallies, keep=[model.version for model in serving])
            self._save_at = 0.0  # what was encoded for a new model is kept at once
            versions = [model.version for model in serving]
            log.info("models serve", versions=versions, canary_share=pointer.canary_share)
            self._settled.set()
        for model in held:
            if model not in serving:
                model.retire()

    def _load_aside(self, version: ModelVersion) -> LoadedModel | None:
        started = time.monotonic()
        self._loading = version
        try:
            model = load_aside(
                lambda: self._load(self._open(version), version, self._settings, self._parts, self._work_aside.run),
                serving=self._models(),
                catalogue=self._catalogue,
                requests=list(self._recent),
                warm_up=self._warm_up,
                unwanted=lambda: self._stop.is_set() or self._unwanted(version),
            )
        except Exception as error:  # whatever is wrong with a bundle must not end this thread
            self._refused.pop(version, None)
            self._refused[version] = str(error) if isinstance(error, TailraceError | OSError) else repr(error)
            _forget_oldest(self._refused, keep=[version])
            serving = [model.version for model in self._models()]
            log.exception("model refused; what serves serves on", version=version, serving=serving)
            return None
        finally:
            self._loading = None
        if model is not None:
            self._refused.pop(version, None)
            log.info("model loaded", version=version, took_s=round(time.monotonic() - started, 2))
        return model

    def _open(self, version: ModelVersion) -> Bundle:
        return self._registry.open(version, self._settings.path("cache") / "bundles")

    def _unwanted(self, version: ModelVersion) -> bool:
        if not self._look.is_set():
            return False
        pointer = self._registry.pointer()
        return pointer is None or version not in (pointer.champion, pointer.canary)

    # Items.

    def _encode_items(self) -> None:
        while not self._stop.is_set():
            self._items_changed.wait(_IDLE_S)
            self._items_changed.clear()
            while self._encode_chunks() and not self._stop.is_set():
                pass
            if time.monotonic() >= self._save_at:
                self._save_at = time.monotonic() + _SAVE_INTERVAL_S
                self._save_items()
        self._save_items()

    def _encode_chunks(self) -> bool:
        """Returns whether more items wait, after a chunk for each model that serves."""
        more = False
        for model in _one_of_each_encoder(self._models()):
            try:
                more |= model.catch_up(self._catalogue)
            except TailraceError as error:
                log.error("items could not be encoded; trying again", version=model.version, error=str(error))
                self._stop.wait(1.0)
        return more

    def _save_items(self) -> None:
        for model in _one_of_each_encoder(self._models()):
            model.encodings.save()


def _one_of_each_encoder(models: Iterable[LoadedModel]) -> Iterable[LoadedModel]:
    return {id(model.encodings): model for model in models}.values()


def _forget_oldest(held: dict[ModelVersion, Any], keep: list[ModelVersion]) -> None:
    for version in [version for version in held if version not in keep][: max(len(held) - _MAX_REMEMBERED, 0)]:
        held.pop(version, None)
