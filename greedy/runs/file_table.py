"""The files that images were read from: how each was, and which are others by now."""

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
import numpy.typing as npt

from greedy.base.errors import UserError
from greedy.cache.files import write_whole
from greedy.runs.record import FILES

TOGETHER = 256  # files that a thread looks at in turn

Numbers = npt.NDArray[np.int64]
Found = TypeVar("Found")
DAMAGED = (ValueError, TypeError, KeyError, EOFError, NotImplementedError, BadZipFile, zlib.error)


@dataclass(frozen=True)
class FileChanges:
    """Names of files, relative to their folder, that are others than in a table of so many."""

    changed: Sequence[str]
    new: Sequence[str]
    gone: Sequence[str]
    files: int


@dataclass(frozen=True)
class FileTable:
    """n files below a folder.

    Attributes:
        names: relative to the folder.
        sizes: in bytes (n,); -1 for a file that is not there.
        times: a number (n,) that is another once a file was touched, or others took its place: of
            its times and of where it lies.
        digests: of the contents (n,), taken when they are wanted.
    """

    names: list[str]
    sizes: Numbers
    times: Numbers
    digests: Numbers

    @classmethod
    def of(cls, root: Path, files: Sequence[Path]) -> Self:
        """The table of files below ``root`` as they are, their contents not looked at."""
        status = np.array(_in_threads(_status, files), np.int64)
        below = "" if root == Path() else f"{root}{os.sep}".replace(2 * os.sep, os.sep)
        names = [os.fspath(file).removeprefix(below) for file in files]
        return cls(names, status[:, 0], status[:, 1], np.zeros(len(files), np.int64))

    def take_digests(self, root: Path, rows: npt.NDArray[np.integer[Any]]) -> None:
        """Takes the digests of the files ``rows`` (m,) as they are below ``root``."""
        self.digests[rows] = _in_threads(_digest, [root / self.names[row] for row in rows])

    def changed_since(self, before: "FileTable", root: Path) -> FileChanges:
        """Returns which files of ``before`` are others in this table of the same folder ``root``:
        in size, or in contents, which are looked at where the time is another."""
        place = {name: row for row, name in enumerate(self.names)}
        now = np.array([place.get(name, -1) for name in before.names], np.int64)
        there = np.flatnonzero(now >= 0)
        now = now[there]
        other_size = self.sizes[now] != before.sizes[there]
        touched = ~other_size & (self.times[now] != before.times[there])
        self.digests[now] = before.digests[there]
        self.take_digests(root, now[touched])
        other = other_size | (self.digests[now] != before.digests[there])
        known = {*before.names}
        return FileChanges(
            [self.names[row] for row in now[other]],
            [name for name in self.names if name not in known],
            [name for name in before.names if name not in place],
            len(before.names),
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
        """Returns the table in a directory, None where there is none. Raises UserError for one that
        is damaged."""
        path = directory / FILES
        try:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as columns:
                names = columns["names"].tobytes().decode("utf-8", "surrogateescape").split("\0")
                numbers = [columns[key] for key in ("sizes", "times", "digests")]
            if any((each.shape, each.dtype) != ((len(names),), np.int64) for each in numbers):
                raise ValueError("its columns do not belong together")
        except FileNotFoundError:
            return None
        except DAMAGED as error:
            raise UserError(
                f"{path} is damaged ({error}): delete it, and what changes in the files is not "
                f"noticed any more"
            ) from error
        return cls(names, *numbers)


def _in_threads(look: Callable[[Path], Found], files: Sequence[Path]) -> list[Found]:
    """What is found about each file, in their order."""
    parts = [files[start : start + TOGETHER] for start in range(0, len(files), TOGETHER)]
    with ThreadPoolExecutor() as pool:
        found = pool.map(lambda part: [look(file) for file in part], parts)
        return [each for part in found for each in part]


def _status(file: Path) -> tuple[int, int]:
    try:
        status = file.stat()
    except OSError:
        return -1, 0
    # Folders that change their names leave the times of the files in them.
    return status.st_size, hash((status.st_mtime_ns, status.st_ctime_ns, status.st_ino))


def _digest(file: Path) -> int:
    """A number that says which bytes a file holds, 0 where it cannot be read."""
    try:
        with file.open("rb") as opened:
            found = hashlib.file_digest(opened, lambda: hashlib.blake2b(digest_size=8)).digest()
    except OSError:
        return 0
    return int.from_bytes(found, signed=True)
