"""The model registry: immutable bundles under versions, and a pointer that says which one serves.

    bundles/<version>/...             the bundle's files
    bundles/<version>/manifest.json   written last; a folder without one is not a bundle
    pointer/<generation>.json         written once each; the highest number is the pointer

Works on a local folder and on any fsspec URL. Both kinds of JSON file are *created*, never changed, in one step: a hard
link from a finished temporary file on a local disk, a create-only PUT (`mode="create"`) on an object store. So two
promoters cannot both win: the second finds its generation taken. A store whose fsspec driver only imitates create-only
writes needs a single promoter.
"""

import hashlib
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import fsspec
import msgspec
from kafka.errors import KafkaError

from tailrace.bundle import MANIFEST, FileEntry, Manifest, decode_manifest, read_card, verify_files
from tailrace.errors import BrokerUnavailable, BundleError, SettingsError
from tailrace.events import ModelAnnouncement, encode
from tailrace.ids import ModelVersion
from tailrace.kafka_clients import close_producer, open_producer
from tailrace.settings import KafkaSettings, Settings
from tailrace.topics import tailrace_topics

MAX_HISTORY = 100
_CHUNK_BYTES = 1 << 20
_VERSION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


class Pointer(msgspec.Struct, frozen=True, kw_only=True):
    """Which version serves. `history` holds the champions before it, newest last; rollback takes the last."""

    generation: int
    champion: ModelVersion
    history: list[ModelVersion]
    reason: Literal["promote", "rollback", "pin"]
    updated_at: datetime


def new_version(now: datetime, token: str | None = None) -> ModelVersion:
    """Returns a version that sorts by time: `v20261123-143000-ab12`. `token` is four random hex digits unless given."""
    return ModelVersion(f"v{now.astimezone(UTC):%Y%m%d-%H%M%S}-{token or secrets.token_hex(2)}")


def open_registry(settings: Settings) -> "Registry":
    """Returns the registry the settings name; a plain path is below `data_dir`."""
    url = settings.registry.url
    return Registry(url if "://" in url else str(settings.path(url)))


class Registry:
    """Bundles and the pointer at `url`. Opens nothing until it is used."""

    def __init__(self, url: str, clock: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        self.url = url
        self._clock = clock
        self._fs: Any
        try:
            self._fs, root = fsspec.core.url_to_fs(url)
        except (ImportError, ValueError) as error:  # a protocol nobody knows, or whose driver is not installed
            raise SettingsError(f"registry.url {url}: {error}") from error
        self._root = str(root).rstrip("/")
        self._local = "file" in (self._fs.protocol if isinstance(self._fs.protocol, tuple) else (self._fs.protocol,))

    # -- bundles ---------------------------------------------------------------------------------------------------

    def publish(
        self,
        directory: Path,
        *,
        version: ModelVersion,
        parent: ModelVersion | None = None,
        metrics: Mapping[str, float] | None = None,
    ) -> Manifest:
        """Returns the manifest of the bundle now published from the files of `directory`.

        Raises BundleError when the version exists or `directory` holds no usable model.json. Dying half-way leaves a
        folder without a manifest, which is no bundle; publishing the version again clears it first.
        """
        # 1. Refuse what must not be published.
        _check_version(version)
        card = read_card(directory)
        if self._fs.exists(self._path("bundles", version, MANIFEST)):
            raise BundleError(f"version {version} exists in {self.url}; published bundles never change")
        # 2. Clear what an attempt that died has left.
        self._fs.invalidate_cache()
        if self._fs.exists(self._path("bundles", version)):
            self._fs.rm(self._path("bundles", version), recursive=True)
        # 3. Upload every file, taking its sum on the way.
        sources = {path.relative_to(directory).as_posix(): path for path in directory.rglob("*") if path.is_file()}
        sources.pop(MANIFEST, None)
        files = {name: self._upload(sources[name], version, name) for name in sorted(sources)}
        # 4. Write the manifest: from here on the bundle exists.
        manifest = Manifest(
            version=version,
            created_at=self._clock(),
            files=files,
            model=card,
            parent=parent,
            metrics=dict(metrics or {}),
        )
        try:
            self._create(self._path("bundles", version, MANIFEST), msgspec.json.encode(manifest))
        except FileExistsError:
            raise BundleError(f"version {version} was published by someone else meanwhile") from None
        return manifest

    def versions(self) -> list[ModelVersion]:
        """Returns every published version, in the order of their names."""
        self._fs.invalidate_cache()
        found = self._fs.glob(self._path("bundles", "*", MANIFEST))
        return sorted(ModelVersion(PurePosixPath(str(path)).parent.name) for path in found)

    def manifest(self, version: ModelVersion) -> Manifest:
        """Returns the manifest of a version. Raises BundleError when there is none or it cannot be read."""
        _check_version(version)
        try:
            data = self._fs.cat_file(self._path("bundles", version, MANIFEST))
        except FileNotFoundError:
            known = ", ".join(self.versions()) or "none"
            raise BundleError(f"no bundle {version} in {self.url} (there: {known})") from None
        return decode_manifest(version, data)

    def fetch(self, version: ModelVersion, cache_dir: Path) -> Path:
        """Returns a local folder with the bundle's files, every size and SHA-256 sum checked.

        A local registry's own folder is used in place; otherwise files are downloaded beside `cache_dir`/version and
        renamed when complete. Raises BundleError naming the file that is missing, damaged, or not of the bundle.
        """
        manifest = self.manifest(version)
        self._check_no_extra(manifest)
        if self._local:
            folder = Path(self._path("bundles", version))
            verify_files(folder, manifest)
            return folder
        kept = cache_dir / version
        if kept.is_dir():
            try:
                verify_files(kept, manifest)
                return kept
            except BundleError:  # the copy rotted or an older program left it: fetch it anew
                shutil.rmtree(kept)
        cache_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{version}-", dir=cache_dir, ignore_cleanup_errors=True) as temporary:
            partial = Path(temporary) / "bundle"
            for name in manifest.files:
                self._download(version, name, partial / name)
            verify_files(partial, manifest)
            try:
                partial.rename(kept)
            except OSError:  # another process finished the same download first: use its copy, if it is sound
                verify_files(kept, manifest)
        return kept

    def export(self, version: ModelVersion, directory: Path) -> Manifest:
        """Copies the bundle, its sums checked, into `directory`, which must be new or empty. Returns the manifest.

        Raises BundleError as `fetch` does.
        """
        if directory.exists() and any(directory.iterdir()):
            raise BundleError(f"{directory} is not empty; a bundle is never written over")
        manifest = self.manifest(version)
        with tempfile.TemporaryDirectory(prefix="tailrace-") as temporary:
            folder = self.fetch(version, Path(temporary))
            for name in manifest.files:
                (directory / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(folder / name, directory / name)
        (directory / MANIFEST).write_bytes(msgspec.json.encode(manifest))
        return manifest

    # -- the pointer -----------------------------------------------------------------------------------------------

    def pointer(self) -> Pointer | None:
        """Returns the pointer, or None where nothing was ever promoted. Raises BundleError when it is damaged."""
        self._fs.invalidate_cache()
        found = sorted(str(path) for path in self._fs.glob(self._path("pointer", "*.json")))
        if not found:
            return None
        try:
            return msgspec.json.decode(self._fs.cat_file(found[-1]), type=Pointer)
        except msgspec.DecodeError as error:
            raise BundleError(f"{PurePosixPath(found[-1]).name}: the pointer is damaged: {error}") from error

    def promote(self, version: ModelVersion, reason: Literal["promote", "pin"] = "promote") -> ModelAnnouncement:
        """Makes `version` the champion and returns what to announce. The champion again: only announces again.

        Raises BundleError when the version is unknown, a file has another size than published, or another promoter
        moved the pointer meanwhile.
        """
        self._check_sizes(self.manifest(version))
        now = self.pointer()
        if now is not None and now.champion == version:
            previous = now.history[-1] if now.history else None
            return _announcement(version, previous, reason, now.updated_at)
        history = [] if now is None else [*now.history, now.champion][-MAX_HISTORY:]
        return self._move(now, version, history, reason)

    def rollback(self) -> ModelAnnouncement:
        """Makes the champion before this one serve again and returns what to announce.

        Raises BundleError when there is none before, it is gone, or another promoter moved the pointer meanwhile.
        """
        now = self.pointer()
        if now is None:
            raise BundleError(f"nothing was ever promoted in {self.url}: there is nothing to roll back")
        if not now.history:
            raise BundleError(f"{now.champion} is the first champion: there is none before it to roll back to")
        self._check_sizes(self.manifest(now.history[-1]))
        return self._move(now, now.history[-1], now.history[:-1], "rollback")

    def _move(
        self,
        now: Pointer | None,
        version: ModelVersion,
        history: list[ModelVersion],
        reason: Literal["promote", "rollback", "pin"],
    ) -> ModelAnnouncement:
        generation = 1 if now is None else now.generation + 1
        moved = Pointer(
            generation=generation, champion=version, history=history, reason=reason, updated_at=self._clock()
        )
        try:
            self._create(self._path("pointer", f"{generation:010d}.json"), msgspec.json.encode(moved))
        except FileExistsError:
            raise BundleError("someone else moved the pointer meanwhile: look at it and try again") from None
        return _announcement(version, now.champion if now else None, reason, moved.updated_at)

    # -- files -----------------------------------------------------------------------------------------------------

    def _path(self, *parts: str) -> str:
        return "/".join((self._root, *parts))

    def _upload(self, source: Path, version: ModelVersion, name: str) -> FileEntry:
        target = self._path("bundles", version, name)
        self._fs.makedirs(target.rpartition("/")[0], exist_ok=True)
        digest, size = hashlib.sha256(), 0
        with source.open("rb") as reader, self._fs.open(target, "wb") as writer:
            while chunk := reader.read(_CHUNK_BYTES):
                digest.update(chunk)
                size += len(chunk)
                writer.write(chunk)
        if self._local:
            _sync(Path(target))
        return FileEntry(digest.hexdigest(), size)

    def _download(self, version: ModelVersion, name: str, target: Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            with self._fs.open(self._path("bundles", version, name), "rb") as reader, target.open("wb") as writer:
                shutil.copyfileobj(reader, writer, _CHUNK_BYTES)
        except FileNotFoundError:
            raise BundleError(f"bundle {version}: {name} is missing") from None

    def _create(self, path: str, data: bytes) -> None:
        """Creates the file whole, in one step. Raises FileExistsError when it is there already."""
        if not self._local:
            self._fs.pipe_file(path, data, mode="create")
            return
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
        try:
            temporary.write_bytes(data)
            _sync(temporary)
            os.link(temporary, target)
            _sync(target.parent)
        finally:
            temporary.unlink(missing_ok=True)

    def _check_no_extra(self, manifest: Manifest) -> None:
        self._fs.invalidate_cache()
        root = self._path("bundles", manifest.version) + "/"
        for path in sorted(map(str, self._fs.find(root))):
            name = path.removeprefix(root)
            if name != MANIFEST and name not in manifest.files and not name.startswith(f".{MANIFEST}."):
                raise BundleError(f"bundle {manifest.version}: {name} is not in its manifest")

    def _check_sizes(self, manifest: Manifest) -> None:
        for name, entry in manifest.files.items():
            path = self._path("bundles", manifest.version, name)
            try:
                size = self._fs.info(path)["size"]
            except FileNotFoundError:
                raise BundleError(f"bundle {manifest.version}: {name} is missing") from None
            if size != entry.bytes:
                raise BundleError(f"bundle {manifest.version}: {name} has {size} bytes, published with {entry.bytes}")


def announce(kafka: KafkaSettings, announcement: ModelAnnouncement) -> None:
    """Tells every replica: produces to `models` under the key `pointer`; returns when the broker has it.

    Raises BrokerUnavailable, also when the broker does not acknowledge within 10 s.
    """
    producer = open_producer(kafka)
    try:
        sent = producer.send(tailrace_topics(kafka)["models"].name, key=b"pointer", value=encode(announcement))
        sent.get(timeout=10)
    except KafkaError as error:
        raise BrokerUnavailable(f"Kafka at {kafka.bootstrap_servers} did not take the announcement: {error}") from error
    finally:
        close_producer(producer, timeout_s=1)


def _announcement(
    version: ModelVersion,
    previous: ModelVersion | None,
    reason: Literal["promote", "rollback", "pin"],
    at: datetime,
) -> ModelAnnouncement:
    return ModelAnnouncement(version=version, previous=previous, reason=reason, occurred_at=at)


def _check_version(version: ModelVersion) -> None:
    if not _VERSION.fullmatch(version):
        raise BundleError(f"{version!r} is no version: letters, digits, dot, dash, underscore; at most 128")


def _sync(path: Path) -> None:
    """Flushes a file or a folder to the disk, so that a manifest never outlives the files it names."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
