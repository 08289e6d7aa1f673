"""Where a store's bytes come from: a local directory, or any store of zarr-python."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from zarr.abc.store import ByteRequest
    from zarr.abc.store import Store as ZarrStore
    from zarr.storage import StorePath

    Location = str | Path | ZarrStore | StorePath


class Source(Protocol):
    """Reads the files of one store by key."""

    def whole(self, key: str) -> bytes | None:
        """All of a file; None where it is absent."""

    def tail(self, key: str, size: int) -> bytes | None:
        """The last `size` bytes, fewer if there are no more; None where the file is absent."""

    def fill(self, key: str, offset: int, buffers: Sequence[NDArray[np.uint8]]) -> bool:
        """Fill buffers one after the other from `offset`; whether the file had enough bytes."""

    def total_bytes(self) -> int:
        """Size of all files."""


class LocalSource:
    """A directory."""

    def __init__(self, root: Path) -> None:
        self._root = root

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

    def fill(self, key: str, offset: int, buffers: Sequence[NDArray[np.uint8]]) -> bool:
        try:
            with (self._root / key).open("rb", buffering=0) as file:
                file.seek(offset)
                return all(file.readinto(buffer.data) == buffer.nbytes for buffer in buffers)
        except FileNotFoundError:
            return False

    def total_bytes(self) -> int:
        return sum(file.stat().st_size for file in self._root.rglob("*") if file.is_file())


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

    def fill(self, key: str, offset: int, buffers: Sequence[NDArray[np.uint8]]) -> bool:
        from zarr.abc.store import RangeByteRequest  # noqa: PLC0415

        size = sum(buffer.nbytes for buffer in buffers)
        found = self._get(key, RangeByteRequest(offset, offset + size))
        if found is None or len(found) != size:
            return False
        start = 0
        for buffer in buffers:
            buffer[:] = np.frombuffer(found, np.uint8)[start : start + buffer.nbytes]
            start += buffer.nbytes
        return True

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
