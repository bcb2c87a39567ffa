"""The model registry: immutable bundles under versions, and a pointer that says which one serves.

    bundles/<version>/...             the bundle's files
    bundles/<version>/manifest.json   written last; a folder without one is not a bundle
    pointer/<generation>.json         written once each; the highest number is the pointer

Works on a local folder and on any fsspec URL. Both kinds of JSON file are *created*, never changed, in one step: a hard
link from a finished temporary file on a local disk, a create-only PUT (`mode="create"`) on an object store. So two
promoters cannot both win: the second finds its generation taken. A store whose fsspec driver only imitates create-only
writes needs a single promoter.
"""

import re
import secrets
import shutil
import tempfile
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath

import msgspec
from kafka.errors import KafkaError

from tailrace import pointer as moves
from tailrace.bundle import MANIFEST, FileEntry, Manifest, PublishedBundle, decode_manifest, read_card
from tailrace.errors import BrokerUnavailable, BundleError
from tailrace.events import ModelAnnouncement, encode
from tailrace.ids import ModelVersion
from tailrace.kafka_clients import close_producer, open_producer
from tailrace.pointer import Move, Pointer, announcement
from tailrace.registry_files import RegistryFiles
from tailrace.settings import KafkaSettings, Settings
from tailrace.topics import tailrace_topics

_MOVED_MEANWHILE = "someone else moved the pointer meanwhile: look at it and try again"
_CHAMPIONS_KEPT = 3
_GENERATIONS_KEPT = 100
_VERSION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


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
        self._files = RegistryFiles(url)

    # -- bundles ---------------------------------------------------------------------------------------------------

    def publish(
        self,
        directory: Path,
        *,
        version: ModelVersion,
        parent: ModelVersion | None = None,
        metrics: Mapping[str, float] | None = None,
        judged: Mapping[str, FileEntry] | None = None,
    ) -> Manifest:
        """Returns the manifest of the bundle now published from the files of `directory`.

        Raises BundleError when the version exists, `directory` holds no usable model.json, or a file is not as it was
        when it was `judged`. Dying half-way leaves a folder without a manifest, which is no bundle; publishing the
        version again clears it first.
        """
        # 1. Refuse what must not be published.
        _check_version(version)
        card = read_card(directory)
        if self._files.exists("bundles", version, MANIFEST):
            raise BundleError(f"version {version} exists in {self.url}; published bundles never change")
        # 2. Clear what an attempt that died has left.
        self._files.clear("bundles", version)
        # 3. Upload every file, taking its sum on the way.
        sources = {path.relative_to(directory).as_posix(): path for path in directory.rglob("*") if path.is_file()}
        sources.pop(MANIFEST, None)
        try:
            files = {name: self._files.upload(sources[name], "bundles", version, name) for name in sorted(sources)}
            for name, entry in (judged or {}).items():
                if files.get(name) != entry:
                    raise BundleError(f"version {version}: {name} is not what was judged, so it is not published")
        except Exception:  # a full disk is the last place to leave half a bundle on
            self._files.clear("bundles", version)
            raise
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
            self._files.create(msgspec.json.encode(manifest), "bundles", version, MANIFEST)
        except FileExistsError:
            raise BundleError(f"version {version} was published by someone else meanwhile") from None
        return manifest

    def versions(self) -> list[ModelVersion]:
        """Returns every published version, in the order of their names."""
        found = self._files.match("bundles", "*", MANIFEST)
        return sorted(ModelVersion(PurePosixPath(path).parent.name) for path in found)

    def prune(self, keep: int) -> list[ModelVersion]:
        """Removes old bundles and returns their versions.

        Those that serve stay, the last champions before, to roll back to, and the newest `keep` beside them. Of the
        pointer's generations a hundred stay, for whoever wants to see how it moved.
        """
        pointer = self.pointer()
        serving = set() if pointer is None else {pointer.champion, pointer.canary, *pointer.history[-_CHAMPIONS_KEPT:]}
        others = [version for version in self.versions() if version not in serving]
        others.sort(key=lambda version: (self.manifest(version).created_at, version))
        removed = others[: max(len(others) - keep, 0)]
        for version in removed:
            # The manifest first: without it there is no bundle, however far this gets.
            self._files.clear("bundles", version, MANIFEST)
            self._files.clear("bundles", version)
        for path in self._files.match("pointer", "*.json")[:-_GENERATIONS_KEPT]:
            self._files.clear("pointer", PurePosixPath(path).name)
        return removed

    def manifest(self, version: ModelVersion) -> Manifest:
        """Returns the manifest of a version. Raises BundleError when there is none or it cannot be read."""
        _check_version(version)
        try:
            data = self._files.read("bundles", version, MANIFEST)
        except FileNotFoundError:
            known = ", ".join(self.versions()) or "none"
            raise BundleError(f"no bundle {version} in {self.url} (there: {known})") from None
        return decode_manifest(version, data)

    def open(self, version: ModelVersion, cache_dir: Path) -> PublishedBundle:
        """Returns a bundle whose files are checked, size and SHA-256 sum, as they are asked for.

        A local registry's own folder is used in place; otherwise each file is downloaded to `cache_dir`/version, where
        only what is sound comes to lie. Raises BundleError, also where a file is not of the bundle.
        """
        manifest = self.manifest(version)
        self._check_no_extra(manifest)
        if self._files.local:
            return PublishedBundle(manifest, Path(self._files.path("bundles", version)))
        # What the registry has let go of goes here, too. Whoever has such a file open keeps it until it is closed.
        known = {*self.versions(), version}
        for folder in cache_dir.glob("*/"):
            if folder.name not in known:
                shutil.rmtree(folder, ignore_errors=True)
        return PublishedBundle(
            manifest,
            cache_dir / version,
            lambda name, target: self._files.download(target, "bundles", version, name),
        )

    def fetch(self, version: ModelVersion, cache_dir: Path) -> Path:
        """Returns a local folder with all of the bundle's files, every one checked as `open` does.

        Raises BundleError naming the file that is missing, damaged, or not of the bundle.
        """
        bundle = self.open(version, cache_dir)
        for name in bundle.manifest.files:
            bundle.file(name)
        return bundle.folder

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
        found = self._files.match("pointer", "*.json")
        if not found:
            return None
        name = PurePosixPath(found[-1]).name
        try:
            return msgspec.json.decode(self._files.read("pointer", name), type=Pointer)
        except msgspec.DecodeError as error:
            raise BundleError(f"{name}: the pointer is damaged: {error}") from error

    # Every move returns what to announce. A move that changes nothing only announces again. Each raises BundleError
    # when a version it would bring to users is unknown or has files of another size than published, when the pointer
    # cannot make the move, and when another promoter moved it meanwhile: since it was at `generation`, where one is
    # given, or since this move looked at it.

    def promote(self, version: ModelVersion, *, generation: int | None = None) -> ModelAnnouncement:
        """Makes `version`, which may be the canary, the champion. Raises Pinned while another is pinned."""
        return self._move(lambda now, at: moves.promoted(now, version, at), version, generation)

    def start_canary(self, version: ModelVersion, share: float, *, generation: int | None = None) -> ModelAnnouncement:
        """Serves `version` to a share of the users beside the champion; the canary again: with another share.

        Raises Pinned, and ValueError for a share that is not above 0 and below 1.
        """
        return self._move(lambda now, at: moves.with_canary(now, version, share, at), version, generation)

    def rollback(self, *, generation: int | None = None) -> ModelAnnouncement:
        """Ends the canary; where none runs, makes the champion before this one serve again."""
        return self._move(moves.rolled_back, None, generation)

    def pin(self, version: ModelVersion) -> ModelAnnouncement:
        """Makes `version` the champion until `unpin`: promotions and canaries are refused."""
        return self._move(lambda now, at: moves.pinned(now, version, at), version)

    def unpin(self) -> ModelAnnouncement:
        """Lets promotions and canaries through again; the champion serves on."""
        return self._move(moves.unpinned)

    def _move(self, move: Move, named: ModelVersion | None = None, generation: int | None = None) -> ModelAnnouncement:
        # 1. Decide on what is there now.
        now = self.pointer()
        if generation is not None and (now is None or now.generation != generation):
            raise BundleError(_MOVED_MEANWHILE)
        moved = move(now, self._clock())
        # 2. Whatever is to serve must be there whole.
        before = set() if now is None else {now.champion, now.canary}
        for version in ({moved.champion, moved.canary} - before) | {named}:
            if version is not None:
                self._check_sizes(self.manifest(version))
        # 3. Create the next generation, unless nothing has changed.
        if now is None or moved.generation != now.generation:
            try:
                self._files.create(msgspec.json.encode(moved), "pointer", f"{moved.generation:010d}.json")
            except FileExistsError:
                raise BundleError(_MOVED_MEANWHILE) from None
        return announcement(moved, now)

    # -- checks ----------------------------------------------------------------------------------------------------

    def _check_no_extra(self, manifest: Manifest) -> None:
        for name in self._files.find("bundles", manifest.version):
            if name != MANIFEST and name not in manifest.files and not name.startswith(f".{MANIFEST}."):
                raise BundleError(f"bundle {manifest.version}: {name} is not in its manifest")

    def _check_sizes(self, manifest: Manifest) -> None:
        for name, entry in manifest.files.items():
            try:
                size = self._files.size("bundles", manifest.version, name)
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


def _check_version(version: ModelVersion) -> None:
    if not _VERSION.fullmatch(version):
        raise BundleError(f"{version!r} is no version: letters, digits, dot, dash, underscore; at most 128")
