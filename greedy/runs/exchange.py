"""Replacing a directory by a finished one, also while other processes read it.

The new directory replaces the old one whole, by renaming: the old is renamed, the new is renamed to
its name, the old is deleted. A process may read in between, so it reads again if anything was
exchanged meanwhile.
"""

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from greedy.cache import remove_tree
from greedy.cache.files import rename, sync_below
from greedy.runs.record import ENCODER, FILES, HEADS, HISTORY, STORE

Result = TypeVar("Result")

NEW, OLD = ".new", ".old"  # endings of the temporary names during an exchange
PART = ".part"  # and before it, while the new directory is filled
CHECKPOINT = "checkpoint"  # the directory in that of an unfinished stage
# The files of greedy in a stage's directory, besides names that begin with a dot or end in .part.
_OWN_NAMES = ("stage.json", ENCODER, HEADS, HISTORY, FILES, STORE, "training")


def read_consistently(paths: Callable[[], Sequence[Path]], read: Callable[[], Result]) -> Result:
    """Returns the result of ``read``, or raises its error, once none of the directories ``paths()``
    was exchanged, or had an entry exchanged, during the call. Until then ``read`` is called
    again."""
    while True:
        before = identities(paths())
        try:
            result = read()
        except Exception:
            if identities(paths()) == before:
                raise
        else:
            if identities(paths()) == before:
                return result


def identities(paths: Sequence[Path]) -> list[tuple[Path, tuple[int, ...] | None]]:
    """Returns an identity of each directory, ``None`` if it does not exist. It differs for another
    directory of the same name, and once an entry or the directory itself was renamed, even back."""
    identified: list[tuple[Path, tuple[int, ...] | None]] = []
    for path in paths:
        try:
            status = path.stat()
            identified.append((path, (status.st_dev, status.st_ino, status.st_ctime_ns)))
        except OSError:
            identified.append((path, None))
    return identified


@contextmanager
def replacing(directory: Path, temporary: Path, *, resume: bool = False) -> Iterator[Path]:
    """Yields the directory ``temporary`` to be filled: empty, or to ``resume`` as it was left. On
    exit without an error it is renamed to ``directory``, and only then is the old one deleted."""
    if temporary.exists() and not resume:
        remove_tree(temporary)
    temporary.mkdir(parents=True, exist_ok=True)
    yield temporary
    sync_below(temporary)
    rename(temporary, exchange_path(directory, NEW))
    exchange(directory)


def exchange_path(directory: Path, suffix: str) -> Path:
    """Returns a temporary name of a directory for its exchange, ``suffix`` being PART, NEW or
    OLD."""
    return directory.with_name(f".{directory.name}{suffix}")


def finished(directory: Path) -> Path:
    """Returns a directory, which has another name if its exchange was interrupted: those who train
    complete that."""
    new = exchange_path(directory, NEW)
    return new if new.is_dir() and not directory.exists() else directory


def exchange(directory: Path) -> None:
    """Renames a finished directory from its temporary name, and deletes the old one. Can be
    repeated after a crash at any point."""
    new, old = exchange_path(directory, NEW), exchange_path(directory, OLD)
    if new.is_dir():
        if (new / CHECKPOINT).is_dir():
            shutil.rmtree(new / CHECKPOINT)
        if directory.exists():
            if old.exists():
                _remove(old, new)
            directory.rename(old)
        rename(new, directory)
    if old.exists():
        _remove(old, directory)


def _remove(old: Path, new: Path) -> None:
    """Deletes the old directory. Files that a user put into a stage's directory are moved into
    the new one."""
    if (old / "stage.json").is_file():
        for path in old.iterdir():
            own = path.name in _OWN_NAMES or path.name.startswith(".") or path.suffix == ".part"
            if not own and not os.path.lexists(new / path.name):
                path.rename(new / path.name)
    remove_tree(old)
