"""Files that are whole or absent, also after a power cut."""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


def write_whole(path: Path, data: bytes) -> None:
    """Write `data` beside `path` and rename it into place."""
    write_parts(path, [data])


def write_parts(path: Path, parts: Iterable[bytes | memoryview]) -> None:
    """The same for data in parts, of which one is in memory at a time."""
    part = part_of(path)
    with naming(part), new_file(part) as file:
        for data in parts:
            file.write(data)
        file.flush()
        os.fsync(file.fileno())
    rename(part, path)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Inside, an error of the system that names no file names `path`: writing never does."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def part_of(path: Path) -> Path:
    """The path at which a file is written before it is renamed to `path`."""
    return path.with_name(path.name + ".part")


def new_file(path: Path) -> BinaryIO:
    """A file opened for writing in the place of whatever was there: never through a link."""
    path.unlink(missing_ok=True)
    return path.open("xb")


def rename(part: Path, path: Path) -> None:
    """Rename a file or directory so that the entry reaches the disk too."""
    part.replace(path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Let a file, or the entries of a directory, reach the disk."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def sync_below(directory: Path) -> None:
    """Let a directory and all that is in it reach the disk."""
    for path in directory.rglob("*"):
        sync(path)
    sync(directory)
