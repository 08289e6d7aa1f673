"""Where the files of a store are written: a directory, or object storage through one.

A shard is written to a file in the store's directory either way. For object storage it is then
uploaded as a whole and deleted, and a note with its digest stays: shards with a note are not
written again.
"""

import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from greedy.cache import shards
from greedy.cache.errors import StoreError
from greedy.cache.files import write_whole
from greedy.cache.metadata import StoreMetadata
from greedy.cache.objects import Objects
from greedy.cache.sources import ByteSource, ReadSource
from greedy.cache.urls import LOCATION, location_of
from greedy.cache.verification import shard_damage

_UPLOADED = ".uploaded"


class Target(Protocol):
    """The files of a store that is written or repaired.

    Attributes:
        root: the directory; a shard is first written to the file with its key there.
    """

    root: Path

    @property
    def source(self) -> ByteSource:
        """Reads them."""

    def write(self, key: str, data: bytes) -> None:
        """Writes a small file."""

    def remove(self, key: str) -> None:
        """Deletes a file, if it exists."""

    def keep(self, key: str, digest: bytes, uploader: ThreadPoolExecutor | None = None) -> None:
        """Puts a shard that is finished in ``root`` into its place, in a thread if ``uploader`` has
        one. Raises the error of an earlier upload."""

    def wait(self) -> None:
        """Waits until all shards are in their places."""

    def kept(self, metadata: StoreMetadata, view: int, shard: int) -> bytes | None:
        """Returns the digest of a shard that an interrupted writer finished, else ``None``."""

    def digest(self, key: str) -> bytes:
        """Computes the digest of a finished shard."""


class LocalTarget:
    """The files of a directory."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.source: ByteSource = ReadSource(root)

    def write(self, key: str, data: bytes) -> None:
        (self.root / key).parent.mkdir(parents=True, exist_ok=True)
        write_whole(self.root / key, data)

    def remove(self, key: str) -> None:
        (self.root / key).unlink(missing_ok=True)

    def keep(self, key: str, digest: bytes, uploader: ThreadPoolExecutor | None = None) -> None:
        pass

    def wait(self) -> None:
        pass

    def kept(self, metadata: StoreMetadata, view: int, shard: int) -> bytes | None:
        if shard_damage(self.source, metadata, view, shard):
            return None
        return self.digest(metadata.shard_key(view, shard))

    def digest(self, key: str) -> bytes:
        return shards.shard_digest(self.root / key)


class ObjectTarget:
    """The files of a store in object storage, for which a directory stands."""

    def __init__(self, root: Path, url: str) -> None:
        self.root = root
        self.source = Objects.at(url)
        self._upload: Future[None] | None = None

    def write(self, key: str, data: bytes) -> None:
        self.source.put(key, data)

    def remove(self, key: str) -> None:
        self.source.remove(key)

    def keep(self, key: str, digest: bytes, uploader: ThreadPoolExecutor | None = None) -> None:
        self.wait()  # one shard is uploaded while the next is written
        if uploader is None:
            self._put(key, digest)
        else:
            self._upload = uploader.submit(self._put, key, digest)

    def wait(self) -> None:
        if self._upload is not None:
            self._upload.result()

    def kept(self, metadata: StoreMetadata, view: int, shard: int) -> bytes | None:
        key = metadata.shard_key(view, shard)
        try:
            digest, size = self._note(key).read_text(encoding="ascii").split()
            if self.source.size(key) != int(size):
                return None
            (self.root / key).unlink(missing_ok=True)  # a kill between the note and this left it
            return bytes.fromhex(digest)
        except (OSError, ValueError):
            return None

    def digest(self, key: str) -> bytes:
        return self.source.digest(key)

    def _put(self, key: str, digest: bytes) -> None:
        path = self.root / key
        self.source.put(key, path)
        write_whole(self._note(key), f"{digest.hex()} {path.stat().st_size}".encode())
        path.unlink()

    def _note(self, key: str) -> Path:
        return self.root / (key + _UPLOADED)


def open_target(directory: Path) -> Target:
    """Returns where the files of the store are written for which a directory stands."""
    url = location_of(directory)
    return LocalTarget(directory) if url is None else ObjectTarget(directory, url)


def remove_tree(directory: Path) -> None:
    """Deletes a directory, and before it the stores in object storage for which directories in it
    stand."""
    for path in sorted(directory.rglob(LOCATION)):
        url = None
        with suppress(StoreError):  # a damaged file names no store
            url = location_of(path.parent)
        if url is not None:
            Objects.at(url).remove_all()
    shutil.rmtree(directory)
