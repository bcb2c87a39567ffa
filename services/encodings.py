"""What one model version has computed of every item: vectors and states by catalogue row, kept up as items change.

Shapes: R rows of the catalogue, N rows asked for, T states per item, H hidden size. States are kept as float16: half
the memory for an error far below int8's. The text an item was encoded from stays beside its numbers, so that an
impression logs exactly what was ranked on.
"""

import hashlib
import threading
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import structlog
from numpy.typing import NDArray

from tailrace.catalogue import Catalogue, Rows
from tailrace.text import render_item

log = structlog.get_logger()

Floats = NDArray[np.float32]
_CHUNK = 32  # items per pass of the model
_DIGEST_BYTES = 16


@dataclass(frozen=True)
class EncodedItems:
    """Items as a model sees them: states [N,T,H], their mask [N,T], unit vectors [N,H]."""

    states: NDArray[np.floating]
    mask: NDArray[np.generic]
    vectors: Floats


class ItemEncoder(Protocol):
    """The half of a scorer that this module needs."""

    def encode_items(self, texts: Sequence[str]) -> EncodedItems:
        """Returns the items' states, mask and vectors."""


class ItemEncodings:
    """Vectors and states by row. One thread calls `catch_up`; any thread reads."""

    def __init__(self, cache_file: Path | None = None) -> None:
        self.texts: list[str | None] = []
        self._cache_file = cache_file
        self._cached: dict[bytes, int] = {}
        self._cache: EncodedItems | None = None
        self._unsaved = 0
        self._lock = threading.Lock()
        self._version = 0
        self._pending: dict[int, None] = {}
        self._ready: NDArray[np.bool_] = np.zeros(0, dtype=np.bool_)
        self._states: NDArray[np.float16] | None = None
        self._mask: NDArray[np.generic] = np.zeros((0, 0), dtype=np.int64)
        self._vectors: Floats = np.zeros((0, 0), dtype=np.float32)
        self._load_cache()

    @property
    def num_pending(self) -> int:
        """How many items still wait to be encoded."""
        return len(self._pending)

    def catch_up(self, encoder: ItemEncoder, catalogue: Catalogue) -> bool:
        """Encodes the newest changes, up to one chunk, and returns whether more wait."""
        # 1. What changed: removed items go at once, new ones before those that wait already.
        changed, self._version = catalogue.changed_since(self._version)
        items = dict(zip(changed.tolist(), catalogue.items_at(changed), strict=True))
        self._drop([row for row, item in items.items() if item is None])
        fresh = dict.fromkeys(row for row, item in items.items() if item is not None)
        self._pending = fresh | {row: None for row in self._pending if row not in items}
        # 2. Take a chunk; an item may have gone meanwhile, and a text may be as it was.
        rows = list(self._pending)[:_CHUNK]
        for row in rows:
            del self._pending[row]
        rendered = [(row, render_item(item)) for row, item in zip(rows, catalogue.items_at(rows), strict=True) if item]
        wanted = [(row, text) for row, text in rendered if row >= len(self.texts) or self.texts[row] != text]
        # 3. From the disk what is there, the rest from the model.
        known = [(row, text, place) for row, text in wanted if (place := self._cached.get(_digest(text))) is not None]
        if known and self._cache is not None:
            places = [place for _, _, place in known]
            held = EncodedItems(self._cache.states[places], self._cache.mask[places], self._cache.vectors[places])
            self._put([row for row, _, _ in known], [text for _, text, _ in known], held)
        new = [(row, text) for row, text in wanted if _digest(text) not in self._cached]
        if new:
            encoded = encoder.encode_items([text for _, text in new])
            self._put([row for row, _ in new], [text for _, text in new], encoded)
            self._unsaved += len(new)
        # 4. Once all are in, what the disk had is no longer needed.
        if not self._pending:
            self._cached, self._cache = {}, None
        return bool(self._pending)

    def ready(self, rows: Rows) -> Rows:
        """Returns those of the rows whose items have been encoded, in the same order."""
        ready = self._ready
        inside = rows[rows < len(ready)]
        return inside[ready[inside]]

    def gather(self, rows: Rows) -> EncodedItems:
        """Returns copies of the rows' states (float32), mask and vectors. Rows must be ready."""
        with self._lock:
            assert self._states is not None, "no row is ready"
            return EncodedItems(self._states[rows].astype(np.float32), self._mask[rows], self._vectors[rows])

    @property
    def vectors(self) -> Floats:
        """Every row's unit vector [R,H], zeros where a row is not ready. Do not write to it."""
        return self._vectors

    def save(self) -> None:
        """Writes the encodings beside their digests, in one step, if enough is new. Nothing is pickled."""
        if self._cache_file is None or self._unsaved == 0 or self._states is None:
            return
        with self._lock:
            rows = np.flatnonzero(self._ready)
            digests = np.frombuffer(b"".join(_digest(self.texts[row] or "") for row in rows), dtype=np.uint8)
            states, mask, vectors = self._states[rows], self._mask[rows], self._vectors[rows]
            self._unsaved = 0
        self._cache_file.parent.mkdir(parents=True, exist_ok=True)
        temporary = self._cache_file.with_suffix(f".{threading.get_native_id()}.tmp")
        with temporary.open("wb") as writer:
            digests = digests.reshape(-1, _DIGEST_BYTES)
            np.savez(writer, digests=digests, states=states, mask=mask, vectors=vectors)
        temporary.replace(self._cache_file)

    def _load_cache(self) -> None:
        if self._cache_file is None or not self._cache_file.exists():
            return
        try:
            with np.load(self._cache_file, allow_pickle=False) as held:
                self._cache = EncodedItems(held["states"], held["mask"], held["vectors"])
                self._cached = {digest.tobytes(): place for place, digest in enumerate(held["digests"])}
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            log.warning("item encodings on disk are unusable; encoding anew", error=str(error))

    def _put(self, rows: list[int], texts: list[str], encoded: EncodedItems) -> None:
        with self._lock:
            self._reserve(max(rows) + 1, encoded)
            assert self._states is not None
            self._states[rows] = encoded.states
            self._mask[rows] = encoded.mask
            self._vectors[rows] = encoded.vectors
            for row, text in zip(rows, texts, strict=True):
                self.texts[row] = text
            self._ready[rows] = True

    def _drop(self, rows: list[int]) -> None:
        with self._lock:
            for row in rows:
                self._pending.pop(row, None)
                if row < len(self.texts):
                    self.texts[row] = None
                    self._ready[row] = False
                    self._vectors[row] = 0.0

    def _reserve(self, size: int, like: EncodedItems) -> None:
        """Makes room for `size` rows. Readers keep the arrays they hold: new ones take their place."""
        if self._states is None:
            self._states = np.zeros((0, *like.states.shape[1:]), dtype=np.float16)
            self._mask = np.zeros((0, *like.mask.shape[1:]), dtype=like.mask.dtype)
            self._vectors = np.zeros((0, *like.vectors.shape[1:]), dtype=np.float32)
        if size > len(self._ready):
            room = max(size, 2 * len(self._ready), 1024) - len(self._ready)
            self._states, self._mask, self._vectors, self._ready = (
                np.concatenate([held, np.zeros((room, *held.shape[1:]), dtype=held.dtype)])
                for held in (self._states, self._mask, self._vectors, self._ready)
            )
            self.texts += [None] * room


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()[:_DIGEST_BYTES]
