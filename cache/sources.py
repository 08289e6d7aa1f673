"""Access to a store's bytes: in a directory, in object storage, or in any store of zarr-python."""

import mmap
import os
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from greedy.cache.chunk_cache import ChunkCache
from greedy.cache.objects import Objects
from greedy.cache.urls import is_url, location_of

if TYPE_CHECKING:
    from zarr.abc.store import ByteRequest
    from zarr.abc.store import Store as ZarrStore
    from zarr.storage import StorePath

    Location = str | Path | ZarrStore | StorePath


# A mapped file holds a descriptor, of which a process may have as few as 256.
_MAX_MAPPED = 128


class ByteSource(Protocol):
    """Access to the files of one store by key.

    Attributes:
        requests: the number of reads that it pays to have under way at a time.
    """

    requests: int

    def whole(self, key: str) -> bytes | None:
        """Reads a whole file; returns ``None`` where it is absent."""

    def tail(self, key: str, size: int) -> bytes | None:
        """Reads the last ``size`` bytes, or all of a smaller file; returns ``None`` where it is
        absent."""

    def part(self, key: str, offset: int, size: int) -> NDArray[np.uint8] | None:
        """Reads ``size`` bytes from ``offset``, as a read-only array; returns ``None`` where the
        file has fewer."""

    def forget(self, key: str, offset: int) -> bool:
        """Forgets what was kept of a damaged part; returns whether it may be intact now."""

    def total_bytes(self) -> int:
        """Returns the size of all files in bytes."""


class LocalSource:
    """The files of a directory.

    Parts are views of mapped files: chunks are decoded from the page cache without a copy.
    Files may be replaced or removed, but if one is shortened in place, or the disk can no longer
    read it, a process that touches the missing bytes ends (SIGBUS).
    """

    requests = 2

    def __init__(self, root: Path) -> None:
        self._root = root
        self._mapped: dict[str, mmap.mmap] = {}

    def __str__(self) -> str:
        return str(self._root)

    def whole(self, key: str) -> bytes | None:
        try:
            return (self._root / key).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None

    def tail(self, key: str, size: int) -> bytes | None:
        try:
            with (self._root / key).open("rb") as file:
                length = file.seek(0, os.SEEK_END)
                file.seek(max(length - size, 0))
                return file.read()
        except FileNotFoundError:
            return None

    def part(self, key: str, offset: int, size: int) -> NDArray[np.uint8] | None:
        mapped = self._mapped.get(key) or self._map(key)
        if mapped is None or offset + size > len(mapped):
            return None
        return np.frombuffer(mapped, np.uint8, size, offset)

    def forget(self, key: str, offset: int) -> bool:
        return False

    def total_bytes(self) -> int:
        return sum(file.stat().st_size for file in self._root.rglob("*") if file.is_file())

    def _map(self, key: str) -> mmap.mmap | None:
        try:
            with (self._root / key).open("rb") as file:
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (FileNotFoundError, ValueError):  # absent, or empty
            return None
        # By default a chunk that is not in memory is read in small pieces, one after the other.
        mapped.madvise(mmap.MADV_SEQUENTIAL)
        if len(self._mapped) >= _MAX_MAPPED:
            self._mapped.clear()
        self._mapped[key] = mapped
        return mapped


class ReadSource(LocalSource):
    """The files of a directory, read and not mapped: a disk that cannot read one gives an error."""

    def part(self, key: str, offset: int, size: int) -> NDArray[np.uint8] | None:
        try:
            with (self._root / key).open("rb") as file:
                file.seek(offset)
                data = file.read(size)
        except FileNotFoundError:
            return None
        return np.frombuffer(data, np.uint8) if len(data) == size else None


class ZarrSource:
    """The files of a group in a store of zarr-python: memory, zip, ..."""

    requests = 2

    def __init__(self, root: "StorePath") -> None:
        self._root = root

    def __str__(self) -> str:
        return str(self._root)

    def whole(self, key: str) -> bytes | None:
        return self._get(key, None)

    def tail(self, key: str, size: int) -> bytes | None:
        from zarr.abc.store import SuffixByteRequest  # noqa: PLC0415

        return self._get(key, SuffixByteRequest(size))

    def part(self, key: str, offset: int, size: int) -> NDArray[np.uint8] | None:
        from zarr.abc.store import RangeByteRequest  # noqa: PLC0415

        data = self._get(key, RangeByteRequest(offset, offset + size))
        if data is None or len(data) != size:
            return None
        return np.frombuffer(data, np.uint8)

    def forget(self, key: str, offset: int) -> bool:
        return False

    def total_bytes(self) -> int:
        from zarr.core.sync import sync  # noqa: PLC0415

        return sync(self._root.store.getsize_prefix(self._root.path))

    def _get(self, key: str, request: "ByteRequest | None") -> bytes | None:
        from zarr.core.sync import sync  # noqa: PLC0415

        buffer = sync((self._root / key).get(byte_range=request))
        return None if buffer is None else buffer.to_bytes()


def open_source(location: "Location", kept: ChunkCache | None = None) -> ByteSource:
    """Opens the source for a path, a URL, or a store of zarr-python with or without a path in it;
    chunks that are read from object storage go into ``kept``."""
    if isinstance(location, str | Path):
        url = location if isinstance(location, str) and is_url(location) else None
        url = url or location_of(Path(location))
        if url is None:
            return LocalSource(Path(location))
        objects = Objects.at(url)
        return kept.around(objects) if kept else objects
    # Imported only here: local stores, the usual ones, need no zarr-python.
    from zarr.core.sync import sync  # noqa: PLC0415
    from zarr.storage import ObjectStore, StorePath  # noqa: PLC0415

    root = location if isinstance(location, StorePath) else StorePath(location)
    if isinstance(root.store, ObjectStore):
        return Objects(root.store.store, root.path, str(root))
    return ZarrSource(sync(StorePath.open(root.store, root.path)))
