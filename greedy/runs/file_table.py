"""The files that images were read from: their state then, and which have changed since."""

import hashlib
import io
import os
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeVar
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from greedy.base.errors import UserError
from greedy.cache.files import write_whole
from greedy.runs.record import FILES

FILES_PER_TASK = 256  # looked at by one thread in turn

Numbers = NDArray[np.int64]
Result = TypeVar("Result")
# What NumPy raises for a damaged archive.
DAMAGE_ERRORS = (
    ValueError,
    TypeError,
    KeyError,
    EOFError,
    NotImplementedError,
    BadZipFile,
    zlib.error,
)


@dataclass(frozen=True)
class FileChanges:
    """The names of files, relative to their folder, that differ from a table of ``files`` files."""

    changed: Sequence[str]
    new: Sequence[str]
    gone: Sequence[str]
    files: int


@dataclass(frozen=True)
class FileTable:
    """A table of n files below a folder.

    Attributes:
        names: relative to the folder.
        sizes: in bytes (n,); -1 for a missing file.
        times: hashes (n,) of each file's times and inode, which differ once it was touched or
            replaced.
        digests: of the contents (n,); 0 until ``compute_digests``.
    """

    names: list[str]
    sizes: Numbers
    times: Numbers
    digests: Numbers

    @classmethod
    def from_files(cls, root: Path, files: Sequence[Path]) -> Self:
        """Returns the table of files below ``root``, without digests."""
        status = np.array(_in_threads(_status, files), np.int64)
        below = "" if root == Path() else f"{root}{os.sep}".replace(2 * os.sep, os.sep)
        names = [os.fspath(file).removeprefix(below) for file in files]
        return cls(names, status[:, 0], status[:, 1], np.zeros(len(files), np.int64))

    def compute_digests(self, root: Path, rows: NDArray[np.integer[Any]]) -> None:
        """Reads the files ``rows`` (m,) below ``root`` and sets their digests."""
        self.digests[rows] = _in_threads(_digest, [root / self.names[row] for row in rows])

    def changed_since(self, before: "FileTable", root: Path) -> FileChanges:
        """Returns how this table differs from an earlier one of the same folder ``root``: in
        names, sizes and contents. Only files whose ``times`` differ are read."""
        rows = {name: row for row, name in enumerate(self.names)}
        new_rows = np.array([rows.get(name, -1) for name in before.names], np.int64)
        old_rows = np.flatnonzero(new_rows >= 0)
        new_rows = new_rows[old_rows]
        resized = self.sizes[new_rows] != before.sizes[old_rows]
        touched = ~resized & (self.times[new_rows] != before.times[old_rows])
        self.digests[new_rows] = before.digests[old_rows]
        self.compute_digests(root, new_rows[touched])
        changed = resized | (self.digests[new_rows] != before.digests[old_rows])
        old_names = {*before.names}
        return FileChanges(
            changed=[self.names[row] for row in new_rows[changed]],
            new=[name for name in self.names if name not in old_names],
            gone=[name for name in before.names if name not in rows],
            files=len(before.names),
        )

    def write(self, directory: Path) -> None:
        """Writes the table into a directory, whole or not at all."""
        names = "\0".join(self.names).encode("utf-8", "surrogateescape")
        packed = io.BytesIO()
        np.savez_compressed(
            packed,
            names=np.frombuffer(names, np.uint8),
            sizes=self.sizes,
            times=self.times,
            digests=self.digests,
        )
        write_whole(directory / FILES, packed.getvalue())

    @classmethod
    def read(cls, directory: Path) -> Self | None:
        """Returns the table in a directory, ``None`` if there is none. Raises ``UserError`` if it
        is damaged."""
        path = directory / FILES
        try:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as columns:
                names = columns["names"].tobytes().decode("utf-8", "surrogateescape").split("\0")
                numbers = [columns[key] for key in ("sizes", "times", "digests")]
            if any((c.shape, c.dtype) != ((len(names),), np.int64) for c in numbers):
                raise ValueError("its columns do not belong together")
        except FileNotFoundError:
            return None
        except (*DAMAGE_ERRORS, OSError) as error:
            if isinstance(error, OSError) and error.filename:
                raise  # of the file, not of the archive in it
            raise UserError(
                f"{path} is damaged ({error}): delete it, after which changes of the image files "
                f"are no longer noticed"
            ) from error
        return cls(names, *numbers)


def _in_threads(function: Callable[[Path], Result], files: Sequence[Path]) -> list[Result]:
    """Returns the function's result for each file, in order."""
    starts = range(0, len(files), FILES_PER_TASK)
    parts = [files[start : start + FILES_PER_TASK] for start in starts]
    with ThreadPoolExecutor() as pool:
        results = pool.map(lambda part: [function(file) for file in part], parts)
        return [result for part in results for result in part]


def _status(file: Path) -> tuple[int, int]:
    try:
        status = file.stat()
    except OSError:
        return -1, 0
    # The inode too: renaming a folder does not change the times of the files in it.
    return status.st_size, hash((status.st_mtime_ns, status.st_ctime_ns, status.st_ino))


def _digest(file: Path) -> int:
    """Returns a hash of a file's contents, 0 if it cannot be read."""
    try:
        with file.open("rb") as opened:
            digest = hashlib.file_digest(opened, lambda: hashlib.blake2b(digest_size=8)).digest()
    except OSError:
        return 0
    return int.from_bytes(digest, signed=True)
