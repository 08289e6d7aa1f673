"""Files that are whole or absent, also after a power cut."""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


def write_whole(path: Path, data: bytes) -> None:
    """Writes ``data`` to a file beside ``path`` and renames it to ``path``."""
    write_parts(path, [data])


def write_parts(path: Path, parts: Iterable[bytes | memoryview]) -> None:
    """Writes a file as ``write_whole`` does, from parts of which one is in memory at a time."""
    part = part_of(path)
    with naming(part), new_file(part) as file:
        for data in parts:
            file.write(data)
        file.flush()
        os.fsync(file.fileno())
    rename(part, path)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Gives ``path`` to the system's errors inside that name no file, as those of writing do."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def part_of(path: Path) -> Path:
    """Returns the path at which a file is written before it is renamed to ``path``."""
    return path.with_name(path.name + ".part")


def new_file(path: Path) -> BinaryIO:
    """Opens a new file for writing in the place of any old one, never through a link."""
    path.unlink(missing_ok=True)
    return path.open("xb")


def rename(part: Path, path: Path) -> None:
    """Renames a file or directory and flushes the directory entry to the disk."""
    part.replace(path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Flushes a file, or the entries of a directory, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_below(directory: Path) -> None:
    """Flushes a directory and everything in it to the disk."""
    for path in directory.rglob("*"):
        sync(path)
    sync(directory)
