"""What a bundle is: a folder of files, a model card, and a manifest with the sum of every file."""

import hashlib
from datetime import datetime
from pathlib import Path, PurePosixPath

import msgspec

from tailrace.errors import BundleError
from tailrace.ids import ModelVersion

MANIFEST = "manifest.json"
MODEL_CARD = "model.json"


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
    return {path.relative_to(folder).as_posix(): FileEntry(_sha256(path), path.stat().st_size) for path in paths}


def verify_files(folder: Path, manifest: Manifest) -> None:
    """Checks the size and SHA-256 sum of every file in `folder`. Raises BundleError naming the first that is wrong."""
    for name, entry in manifest.files.items():
        path = folder / name
        if not path.is_file():
            raise BundleError(f"bundle {manifest.version}: {name} is missing")
        if (size := path.stat().st_size) != entry.bytes:
            raise BundleError(f"bundle {manifest.version}: {name} has {size} bytes, published with {entry.bytes}")
        if _sha256(path) != entry.sha256:
            raise BundleError(f"bundle {manifest.version}: {name} does not have the sum it was published with")


def _sha256(path: Path) -> str:
    with path.open("rb") as reader:
        return hashlib.file_digest(reader, "sha256").hexdigest()
