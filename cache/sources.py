"""Where a store's bytes come from: a local directory, or any store of zarr-python."""

import mmap
import os
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from zarr.abc.store import ByteRequest
    from zarr.abc.store import Store as ZarrStore
    from zarr.storage import StorePath

    Location = str | Path | ZarrStore | StorePath


# A mapped file holds a descriptor, of which a process may have as few as 256.
_MAX_MAPPED = 128


class Source(Protocol):
    """Reads the files of one store by key."""

    def whole(self, key: str) -> bytes | None:
        """All of a file; None where it is absent."""

    def tail(self, key: str, size: int) -> bytes | None:
        """The last `size` bytes, fewer if there are no more; None where the file is absent."""

    def part(self, key: str, offset: int, size: int) -> NDArray[np.uint8] | None:
        """`size` bytes from `offset`, not to be written to; None where the file has fewer."""

    def total_bytes(self) -> int:
        """Size of all files."""


class LocalSource:
    """A directory.

    Parts are views of mapped files: chunks are decoded from the page cache without a copy
    between. Files may be replaced or removed, but shortening one in place, or a disk that can
    no longer read it, ends a process that touches the missing bytes (SIGBUS).
    """

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

    def total_bytes(self) -> int:
        return sum(file.stat().st_size for file in self._root.rglob("*") if file.is_file())

    def _map(self, key: str) -> mmap.mmap | None:
        try:
            with (self._root / key).open("rb") as file:
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (FileNotFoundError, ValueError):  # absent, or empty
            return None
        # Unadvised, a chunk that is not in memory comes in small pieces, each awaited.
        mapped.madvise(mmap.MADV_SEQUENTIAL)
        if len(self._mapped) >= _MAX_MAPPED:
            self._mapped.clear()
        self._mapped[key] = mapped
        return mapped


class ZarrSource:
    """A group in a store of zarr-python: memory, zip, object storage, ..."""

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

        found = self._get(key, RangeByteRequest(offset, offset + size))
        if found is None or len(found) != size:
            return None
        return np.frombuffer(found, np.uint8)

    def total_bytes(self) -> int:
        from zarr.core.sync import sync  # noqa: PLC0415

        return sync(self._root.store.getsize_prefix(self._root.path))

    def _get(self, key: str, request: "ByteRequest | None") -> bytes | None:
        from zarr.core.sync import sync  # noqa: PLC0415

        found = sync((self._root / key).get(byte_range=request))
        return None if found is None else found.to_bytes()


def open_source(location: "Location") -> Source:
    """The source for a path, or for a store (with or without a path inside) of zarr-python."""
    if isinstance(location, str | Path):
        return LocalSource(Path(location))
    # Imported only here: local stores, the usual ones, do without zarr-python.
    from zarr.core.sync import sync  # noqa: PLC0415
    from zarr.storage import StorePath  # noqa: PLC0415

    inside = location if isinstance(location, StorePath) else StorePath(location)
    return ZarrSource(sync(StorePath.open(inside.store, inside.path)))
