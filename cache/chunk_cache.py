"""Chunks of stores in object storage, kept on the local disk."""

import hashlib
import os
import shutil
import threading
import weakref
from contextlib import suppress
from functools import cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from greedy.cache.objects import Objects


class ChunkCache:
    """The directory of a cache, and how much is in it. Made by ``open_chunk_cache``.

    Each chunk is a file, in a directory of its store. In an epoch each chunk is read once, in
    random order, so that the chunk that was not used for longest is as good as any other: chunks of
    stores that are open stay, those of others make room, and where there is none the
    rest is read from its server each time.
    """

    def __init__(self, root: Path, limit: int) -> None:
        self.root = root
        self._limit = limit
        self._lock = threading.Lock()
        self._open: weakref.WeakSet[CachedSource] = weakref.WeakSet()
        self._full_for: frozenset[Path] = frozenset()
        self._used = _bytes_in(root)

    def around(self, objects: Objects) -> "CachedSource":
        """Returns the files of a store, of which chunks are kept."""
        source = CachedSource(self, objects)
        self._open.add(source)
        return source

    def admit(self, path: Path, data: NDArray[np.uint8]) -> None:
        """Keeps a chunk if there is room. A disk that is full keeps none."""
        part = path.with_name(f"{path.name}.{os.getpid()}.part")
        with self._lock:
            more = len(data) - _size(path)  # another thread may have kept it meanwhile
            if self._used + more > self._limit and not self._make_room(more):
                return
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                part.write_bytes(data.data)
                part.replace(path)
                self._used += more
            except OSError:
                with suppress(OSError):
                    part.unlink()

    def left(self, size: int) -> None:
        """Counts bytes that are no longer kept."""
        with self._lock:
            self._used -= size
            self._full_for = frozenset()

    def _make_room(self, size: int) -> bool:
        """Deletes chunks of stores that are not open, of the store that was opened longest ago
        first, until ``size`` bytes fit. Returns whether they do."""
        opened = frozenset(source.directory for source in list(self._open))
        if opened == self._full_for:
            return False
        self._used = _bytes_in(self.root)  # other processes write and delete too
        for directory in sorted(_directories(self.root), key=_last_opened):
            if self._used + size <= self._limit:
                break
            if directory not in opened:
                self._used -= _bytes_in(directory)
                shutil.rmtree(directory, ignore_errors=True)
        fits = self._used + size <= self._limit
        self._full_for = frozenset() if fits else opened
        return fits


class CachedSource:
    """The files of a store in object storage, of which the chunks that were read are kept.

    A chunk that is damaged in the cache is read from the server again.
    """

    requests = Objects.requests

    def __init__(self, kept: ChunkCache, objects: Objects) -> None:
        self._cache = kept
        self._objects = objects
        self._buffers = threading.local()
        self.directory = kept.root / _name(str(objects))
        with suppress(OSError):
            os.utime(self.directory)

    def __str__(self) -> str:
        return str(self._objects)

    def whole(self, key: str) -> bytes | None:
        return self._objects.whole(key)

    def tail(self, key: str, size: int) -> bytes | None:
        """Reads the end of a file; chunks of another file that had this place are deleted."""
        data = self._objects.tail(key, size)
        current = self._prefix(key)
        for path in self.directory.glob(f"{_name(key)}.*"):
            if current is None or not path.name.startswith(current):
                self._drop(path)
        return data

    def part(self, key: str, offset: int, size: int) -> NDArray[np.uint8] | None:
        """Reads a part as ``ByteSource`` has it; the array is valid until this thread's next
        read."""
        path = self._path(key, offset)
        if path is None:
            return self._objects.part(key, offset, size)
        if (kept := self._kept(path, size)) is not None:
            return kept
        data = self._objects.part(key, offset, size)
        if data is not None:
            self._cache.admit(path, data)
        return data

    def forget(self, key: str, offset: int) -> bool:
        path = self._path(key, offset)
        was_kept = path is not None and self._drop(path)
        return self._objects.forget(key, offset) or was_kept

    def total_bytes(self) -> int:
        return self._objects.total_bytes()

    def _path(self, key: str, offset: int) -> Path | None:
        """Returns the file of a chunk, ``None`` if it is not known of which object it is."""
        prefix = self._prefix(key)
        return None if prefix is None else self.directory / f"{prefix}{offset}"

    def _prefix(self, key: str) -> str | None:
        version = self._objects.version(key)
        return None if version is None else f"{_name(key)}.{_name(version)}."

    def _kept(self, path: Path, size: int) -> NDArray[np.uint8] | None:
        """Returns a chunk in this thread's buffer: to map a file or new memory for each chunk would
        cost a tenth of the time of decoding it."""
        buffer = getattr(self._buffers, "bytes", None)
        if buffer is None or len(buffer) < size:
            buffer = self._buffers.bytes = np.empty(size, np.uint8)
        try:
            with path.open("rb", buffering=0) as file:
                complete = file.readinto(buffer[:size].data) == size
        except OSError:
            return None
        return buffer[:size] if complete else None

    def _drop(self, path: Path) -> bool:
        try:
            size = path.stat().st_size
            path.unlink()
        except OSError:
            return False
        self._cache.left(size)
        return True


@cache
def open_chunk_cache(root: Path, limit: int) -> ChunkCache:
    """Returns the cache in a directory, which need not exist, with at most ``limit`` bytes."""
    return ChunkCache(root, limit)


def _name(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _directories(root: Path) -> list[Path]:
    return [path for path in root.iterdir() if path.is_dir()] if root.is_dir() else []


def _last_opened(directory: Path) -> float:
    try:
        return directory.stat().st_mtime
    except OSError:
        return 0


def _bytes_in(directory: Path) -> int:
    total = 0
    for top, _, names in os.walk(directory):
        for name in names:
            total += _size(Path(top, name))
    return total


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
