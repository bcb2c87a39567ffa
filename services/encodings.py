"""What an item encoder has computed of every item: vectors and states by catalogue row, kept up as items change.

Versions whose item encoder is the same, to the byte, share them, and a swap between such versions encodes nothing.

Shapes: R rows of the catalogue, N rows asked for, T states per item, H hidden size. States are kept as float16: half
the memory for an error far below int8's. The text an item was encoded from stays beside its numbers, so that an
impression logs exactly what was ranked on.
"""

import contextlib
import hashlib
import os
import threading
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import structlog
from numpy.typing import NDArray

from tailrace.bundle import Bundle
from tailrace.catalogue import Catalogue, Flags, Rows
from tailrace.text import render_item

log = structlog.get_logger()

Floats = NDArray[np.float32]
States = NDArray[np.float16]
Arrays = tuple[States, Flags, Floats]  # states [N,T,H], their mask [N,T], unit vectors [N,H]

_CHUNK = 32  # items per pass of the model
_DIGEST_BYTES = 16
_MAX_CACHE_FILES = 4


@dataclass(frozen=True)
class EncodedItems:
    """Copies of N items' encodings and the texts they were made from, as they stood together at one moment."""

    texts_N: list[str]
    states_NTH: States
    mask_NT: Flags
    vectors_ND: Floats


def encoder_digest(bundle: Bundle, precision: str, graph: str, max_tokens: int) -> str:
    """Returns what tells an encoder of a bundle from others, of items or users: those that encode alike have the same.

    `graph` is its name, `max_tokens` where it cuts texts.
    """
    digest = hashlib.sha256(f"{precision} {max_tokens}".encode())
    for name in (f"{precision}/{graph}.onnx", f"{precision}/words.bin", "tokenizer.json"):
        digest.update(bytes.fromhex(bundle.sum(name)))
    return digest.hexdigest()[:32]


def cache_file(cache_dir: Path, encoder: str) -> Path:
    """Returns where the encodings that an encoder makes are kept on disk; `encoder` is its digest.

    Files of encoders that have not been used of late are removed.
    """
    found = cache_dir / f"{encoder}.npz"
    with contextlib.suppress(FileNotFoundError):  # not there yet; or another replica removes one at the same time
        others = sorted(cache_dir.glob("*.npz"), key=lambda file: (file == found, file.stat().st_mtime))
        for file in others[:-_MAX_CACHE_FILES]:
            file.unlink()
        os.utime(found)  # used of late
    return found


class ItemEncoder(Protocol):
    """The half of a model that this module needs."""

    def encode_items(self, texts: Sequence[str]) -> Arrays:
        """Returns the items' states, mask and vectors."""


class ItemEncodings:
    """Vectors and states by row. One thread calls `catch_up` and `save`; any thread reads.

    `cache_file` keeps them on disk by the digest of the text, for the same item encoder started again.
    """

    def __init__(self, vector_size: int, cache_file: Path | None = None) -> None:
        self.texts: list[str | None] = []
        self._nothing: Arrays = (
            np.zeros((0, 1, vector_size), dtype=np.float16),
            np.zeros((0, 1), dtype=np.bool_),
            np.zeros((0, vector_size), dtype=np.float32),
        )
        self._cache_file = cache_file
        self._cached_at, self._cached = _load_cache(cache_file, vector_size)
        self._unsaved = 0
        self._version = 0
        self._pending: dict[int, None] = {}
        self._lock = threading.Lock()
        self._ready: Flags = np.zeros(0, dtype=np.bool_)
        self._held: Arrays | None = None

    @property
    def num_pending(self) -> int:
        """How many items still wait to be encoded."""
        return len(self._pending)

    @property
    def num_ready(self) -> int:
        """How many items have been encoded."""
        return int(self._ready.sum())

    @property
    def vectors(self) -> Floats:
        """Every row's unit vector [R,H], zeros where a row is not ready. Do not write to it."""
        return (self._held or self._nothing)[2]

    def ready(self, rows: Rows) -> Flags:
        """Returns which of the rows [N] have been encoded."""
        ready = self._ready
        inside: Flags = rows < len(ready)
        inside[inside] = ready[rows[inside]]
        return inside

    def gather(self, rows: Rows) -> tuple[Flags, EncodedItems]:
        """Returns which rows are ready [R], and copies of those N that are, text and numbers of the same moment."""
        with self._lock:
            ready = self.ready(rows)
            kept = rows[ready]
            states, mask, vectors = self._held or self._nothing
            texts = [text for row in kept.tolist() if (text := self.texts[row]) is not None]
            return ready, EncodedItems(texts, states[kept], mask[kept], vectors[kept])

    def catch_up(self, encoder: ItemEncoder, catalogue: Catalogue) -> bool:
        """Encodes the newest changes, up to one chunk, and returns whether more wait."""
        # 1. What changed: removed items go at once; new ones go before those that wait already.
        changed, self._version = catalogue.changed_since(self._version)
        items = dict(zip(changed.tolist(), catalogue.items_at(changed), strict=True))
        self._drop([row for row, item in items.items() if item is None])
        fresh = dict.fromkeys(row for row, item in items.items() if item is not None)
        self._pending = fresh | {row: None for row in self._pending if row not in items}
        # 2. Take a chunk; an item may have gone meanwhile, and a text may be as it was.
        rows = list(self._pending)[:_CHUNK]
        texts = {row: render_item(item) for row, item in zip(rows, catalogue.items_at(rows), strict=True) if item}
        texts = {row: text for row, text in texts.items() if row >= len(self.texts) or self.texts[row] != text}
        # 3. From the disk what is there, the rest from the model.
        places = {
            row: place for row, text in texts.items() if (place := self._cached_at.get(_digest(text))) is not None
        }
        if places and self._cached is not None:
            states, mask, vectors = self._cached
            kept = list(places.values())
            self._put({row: texts[row] for row in places}, (states[kept], mask[kept], vectors[kept]))
        new = {row: text for row, text in texts.items() if row not in places}
        if new:
            self._put(new, encoder.encode_items(list(new.values())))
            self._unsaved += len(new)
        for row in rows:
            del self._pending[row]
        # 4. Once all are in, what the disk had is no longer needed.
        if not self._pending:
            self._cached_at, self._cached = {}, None
        return bool(self._pending)

    def save(self) -> None:
        """Writes the encodings beside their digests, in one step, if anything is new. Nothing is pickled."""
        if self._cache_file is None or self._unsaved == 0 or self._held is None:
            return
        _, held = self.gather(np.flatnonzero(self._ready))
        digests = np.frombuffer(b"".join(map(_digest, held.texts_N)), dtype=np.uint8)
        self._cache_file.parent.mkdir(parents=True, exist_ok=True)
        temporary = self._cache_file.with_suffix(f".{threading.get_native_id()}.tmp")
        try:
            with temporary.open("wb") as writer:
                digests = digests.reshape(-1, _DIGEST_BYTES)
                np.savez(writer, digests=digests, states=held.states_NTH, mask=held.mask_NT, vectors=held.vectors_ND)
            temporary.replace(self._cache_file)
            self._unsaved = 0
        except OSError as error:
            log.warning("item encodings could not be kept on disk", error=str(error))
            temporary.unlink(missing_ok=True)

    def _put(self, texts: dict[int, str], encoded: Arrays) -> None:
        rows = list(texts)
        with self._lock:
            held = self._reserve(max(rows) + 1, encoded)
            held[0][rows], held[1][rows], held[2][rows] = encoded
            for row, text in texts.items():
                self.texts[row] = text
            self._ready[rows] = True

    def _drop(self, rows: list[int]) -> None:
        with self._lock:
            for row in rows:
                self._pending.pop(row, None)
                if row < len(self.texts) and self._held is not None:
                    self.texts[row] = None
                    self._ready[row] = False
                    self._held[2][row] = 0.0

    def _reserve(self, size: int, like: Arrays) -> Arrays:
        """Returns the arrays with room for `size` rows. Larger ones take their place; readers keep those they hold."""
        held = self._held or (like[0][:0], like[1][:0], like[2][:0])
        room = max(size, 2 * len(self._ready), 1024) - len(self._ready) if size > len(self._ready) else 0
        if room:
            states, mask, vectors = (
                np.concatenate([array, np.zeros((room, *array.shape[1:]), dtype=array.dtype)]) for array in held
            )
            held = (states, mask, vectors)
            self.texts += [None] * room
            self._held = held
            self._ready = np.concatenate([self._ready, np.zeros(room, dtype=np.bool_)])
        return held


def _load_cache(file: Path | None, vector_size: int) -> tuple[dict[bytes, int], Arrays | None]:
    if file is None or not file.exists():
        return {}, None
    try:
        with np.load(file, allow_pickle=False) as held:
            arrays = (held["states"], held["mask"], held["vectors"])
            if len({len(array) for array in (*arrays, held["digests"])}) != 1 or arrays[2].shape[1:] != (vector_size,):
                raise ValueError("the arrays do not fit together")
            return {digest.tobytes(): place for place, digest in enumerate(held["digests"])}, arrays
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        log.warning("item encodings on disk are unusable; encoding anew", error=str(error))
        return {}, None


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()[:_DIGEST_BYTES]
