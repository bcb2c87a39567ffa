"""What a bundle is: a folder of files, a model card, and a manifest with the sum of every file."""

import hashlib
import tempfile
from collections.abc import Callable
from datetime import datetime
from pathlib import Path, PurePosixPath
from typing import Protocol

import msgspec

from tailrace.errors import BundleError
from tailrace.ids import ModelVersion

MANIFEST = "manifest.json"
MODEL_CARD = "model.json"

_CHUNK_BYTES = 4 * 1024 * 1024  # hashed at once: other threads run meanwhile, and few pieces disturb them little


class ModelCard(msgspec.Struct, frozen=True, kw_only=True):
    """What a bundle's `model.json` says of itself, as far as the registry cares; other fields are left alone."""

    base_model: str
    split_layer: int
    item_states: int
    feature_names_hash: str
    text_version: int | str
    precisions: list[str]


class FileEntry(msgspec.Struct, frozen=True):
    """One file of a bundle."""

    sha256: str
    bytes: int


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """What was published: every file with its sum, what the model is, where it came from and how it measured."""

    version: ModelVersion
    created_at: datetime
    files: dict[str, FileEntry]
    model: ModelCard
    parent: ModelVersion | None = None
    metrics: dict[str, float] = {}


def read_card(directory: Path) -> ModelCard:
    """Returns the model card of a bundle's folder. Raises BundleError when there is none or it lacks a field."""
    try:
        return msgspec.json.decode((directory / MODEL_CARD).read_bytes(), type=ModelCard)
    except OSError as error:
        raise BundleError(f"{directory.name} is no bundle: no {MODEL_CARD}") from error
    except msgspec.DecodeError as error:
        raise BundleError(f"{directory.name}: {MODEL_CARD}: {error}") from error


def decode_manifest(version: ModelVersion, data: bytes) -> Manifest:
    """Returns a manifest. Raises BundleError when it is damaged, another version's, or names a file elsewhere."""
    try:
        manifest = msgspec.json.decode(data, type=Manifest)
    except msgspec.DecodeError as error:
        raise BundleError(f"bundle {version}: {MANIFEST} is damaged: {error}") from error
    if manifest.version != version:
        raise BundleError(f"bundle {version}: {MANIFEST} is of version {manifest.version}")
    for name in manifest.files:
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
            raise BundleError(f"bundle {version}: {MANIFEST} names a file outside the bundle: {name}")
    return manifest


def sum_files(folder: Path) -> dict[str, FileEntry]:
    """Returns the size and SHA-256 sum of every file in `folder`, by its name there."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): FileEntry(hash_file(path), path.stat().st_size) for path in paths}


class Bundle(Protocol):
    """A bundle that is being opened, file by file: what is not asked for is neither fetched nor read."""

    def file(self, name: str) -> Path:
        """Returns where a file lies. Raises BundleError where it is known to be missing or damaged."""

    def sum(self, name: str) -> str:
        """Returns a file's SHA-256 sum. Raises BundleError where there is no such file."""


class LooseBundle:
    """A `Bundle` that was not published: files in a folder, without a manifest, taken as they are."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def file(self, name: str) -> Path:
        """Returns where a file of this name would lie."""
        return self._folder / name

    def sum(self, name: str) -> str:
        """Returns a file's SHA-256 sum, by reading it. Raises BundleError."""
        try:
            return hash_file(self._folder / name)
        except OSError as error:
            raise BundleError(f"{self._folder / name}: {error}") from error


class PublishedBundle:
    """A `Bundle` with a manifest, each file checked against it before its first use.

    `fetch` brings a file to the path it is given, where the folder is a cache of what lies elsewhere.
    """

    def __init__(self, manifest: Manifest, folder: Path, fetch: Callable[[str, Path], None] | None = None) -> None:
        self.manifest = manifest
        self.folder = folder
        self._fetch = fetch
        self._checked: set[str] = set()

    def file(self, name: str) -> Path:
        """Returns where a file lies, its size and sum checked. Raises BundleError."""
        path = self.folder / name
        if name not in self._checked:
            entry = self._entry(name)
            if self._fetch is None:
                self._check(path, name, entry)
            else:
                try:
                    self._check(path, name, entry)
                except BundleError:  # not there yet, or the copy rotted
                    self._fetch_anew(path, name, entry)
            self._checked.add(name)
        return path

    def sum(self, name: str) -> str:
        """Returns the SHA-256 sum that a file was published with. Raises BundleError where there is no such file."""
        return self._entry(name).sha256

    def _entry(self, name: str) -> FileEntry:
        try:
            return self.manifest.files[name]
        except KeyError:
            raise BundleError(f"bundle {self.manifest.version}: {name} is missing") from None

    def _fetch_anew(self, path: Path, name: str, entry: FileEntry) -> None:
        assert self._fetch is not None
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{self.folder.name}-", dir=self.folder.parent) as temporary:
            partial = Path(temporary) / "file"
            try:
                self._fetch(name, partial)
            except FileNotFoundError:
                raise BundleError(f"bundle {self.manifest.version}: {name} is missing") from None
            self._check(partial, name, entry)
            path.parent.mkdir(parents=True, exist_ok=True)
            partial.replace(path)

    def _check(self, path: Path, name: str, entry: FileEntry) -> None:
        version = self.manifest.version
        if not path.is_file():
            raise BundleError(f"bundle {version}: {name} is missing")
        if (size := path.stat().st_size) != entry.bytes:
            raise BundleError(f"bundle {version}: {name} has {size} bytes, published with {entry.bytes}")
        if hash_file(path) != entry.sha256:
            raise BundleError(f"bundle {version}: {name} does not have the sum it was published with")


def hash_file(path: Path) -> str:
    """Returns a file's SHA-256 sum in hex. Raises OSError."""
    digest, held = hashlib.sha256(), bytearray(min(_CHUNK_BYTES, max(path.stat().st_size, 1)))
    with path.open("rb", buffering=0) as reader:
        while size := reader.readinto(held):
            digest.update(memoryview(held)[:size])
    return digest.hexdigest()
