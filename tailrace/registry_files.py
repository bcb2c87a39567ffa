"""The files of a registry, in a local folder or under any fsspec URL: created whole, in one step, and never changed."""

import hashlib
import os
import secrets
import shutil
from pathlib import Path
from typing import Any

import fsspec

from tailrace.bundle import FileEntry
from tailrace.errors import SettingsError

_CHUNK_BYTES = 1 << 20


class RegistryFiles:
    """Reads and creates files below `url`, named by path parts. Opens nothing until it is used."""

    def __init__(self, url: str) -> None:
        self._fs: Any
        try:
            self._fs, root = fsspec.core.url_to_fs(url)
        except (ImportError, ValueError) as error:  # a protocol nobody knows, or whose driver is not installed
            raise SettingsError(f"registry.url {url}: {error}") from error
        self._root = str(root).rstrip("/")
        self.local = "file" in (self._fs.protocol if isinstance(self._fs.protocol, tuple) else (self._fs.protocol,))

    def path(self, *parts: str) -> str:
        """Returns where a file is, as the filesystem knows it."""
        return "/".join((self._root, *parts))

    def exists(self, *parts: str) -> bool:
        """Returns whether there is such a file or folder."""
        return bool(self._fs.exists(self.path(*parts)))

    def find(self, *parts: str) -> list[str]:
        """Returns the names of all files below a folder, relative to it, sorted."""
        self._fs.invalidate_cache()
        folder = self.path(*parts) + "/"
        return sorted(str(path).removeprefix(folder) for path in self._fs.find(folder))

    def match(self, *parts: str) -> list[str]:
        """Returns the paths that match a pattern, sorted."""
        self._fs.invalidate_cache()
        return sorted(str(path) for path in self._fs.glob(self.path(*parts)))

    def read(self, *parts: str) -> bytes:
        """Returns a file's bytes. Raises FileNotFoundError."""
        return bytes(self._fs.cat_file(self.path(*parts)))

    def size(self, *parts: str) -> int:
        """Returns a file's size in bytes. Raises FileNotFoundError."""
        return int(self._fs.info(self.path(*parts))["size"])

    def clear(self, *parts: str) -> None:
        """Removes a folder with all that is in it, if it is there."""
        self._fs.invalidate_cache()
        if self.exists(*parts):
            self._fs.rm(self.path(*parts), recursive=True)

    def upload(self, source: Path, *parts: str) -> FileEntry:
        """Copies a local file here and returns its size and sum, taken on the way."""
        target = self.path(*parts)
        self._fs.makedirs(target.rpartition("/")[0], exist_ok=True)
        digest, size = hashlib.sha256(), 0
        with source.open("rb") as reader, self._fs.open(target, "wb") as writer:
            while chunk := reader.read(_CHUNK_BYTES):
                digest.update(chunk)
                size += len(chunk)
                writer.write(chunk)
        if self.local:
            _sync(Path(target))
        return FileEntry(digest.hexdigest(), size)

    def download(self, target: Path, *parts: str) -> None:
        """Copies a file to `target`. Raises FileNotFoundError."""
        target.parent.mkdir(parents=True, exist_ok=True)
        with self._fs.open(self.path(*parts), "rb") as reader, target.open("wb") as writer:
            shutil.copyfileobj(reader, writer, _CHUNK_BYTES)

    def create(self, data: bytes, *parts: str) -> None:
        """Creates the file whole, in one step. Raises FileExistsError when it is there already."""
        path = self.path(*parts)
        if not self.local:
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


def _sync(path: Path) -> None:
    """Flushes a file or a folder to the disk, so that a manifest never outlives the files it names."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
