"""Something finished takes the place of what was there, also while others read.

It takes its place whole, by renaming: what is there goes aside, the new comes, the old is deleted.
A reader may come in between, so what it read counts only if nothing was exchanged meanwhile.
"""

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from greedy.cache.files import rename, sync_below
from greedy.runs.record import ENCODER, FILES, HEADS, HISTORY

Found = TypeVar("Found")

NEW, OLD = ".new", ".old"  # these endings exist only for the moment of the exchange
CHECKPOINT = "checkpoint"  # of a stage in the making: a finished one has none
# All that a stage's directory holds of ours, but for what begins with a dot or ends in .part.
_OURS = ("stage.json", ENCODER, HEADS, HISTORY, FILES, "activations.zarr", "training")


def undisturbed(places: Callable[[], Sequence[Path]], read: Callable[[], Found]) -> Found:
    """Returns what ``read`` reads, or raises what it raises, as soon as none of the directories
    that ``places`` names was exchanged for another, or had an entry exchanged, while it read."""
    while True:
        before = identities(places())
        try:
            found = read()
        except Exception:
            if identities(places()) == before:
                raise
        else:
            if identities(places()) == before:
                return found


def identities(places: Sequence[Path]) -> list[tuple[Path, tuple[int, ...] | None]]:
    """Returns by what each directory is told from any that takes its place, and from itself with
    other entries. Renaming changes the time of change, so that one that went and came back differs
    too."""
    found: list[tuple[Path, tuple[int, ...] | None]] = []
    for path in places:
        try:
            status = path.stat()
            found.append((path, (status.st_dev, status.st_ino, status.st_ctime_ns)))
        except OSError:
            found.append((path, None))
    return found


@contextmanager
def replacing(directory: Path, workshop: Path, *, go_on: bool = False) -> Iterator[Path]:
    """Gives a directory ``workshop`` to make something in: empty, or to ``go_on`` as it was left.
    On clean exit it becomes ``directory``, and only then does what was there before go."""
    if workshop.exists() and not go_on:
        shutil.rmtree(workshop)
    workshop.mkdir(parents=True, exist_ok=True)
    yield workshop
    sync_below(workshop)
    rename(workshop, beside(directory, NEW))
    exchange(directory)


def beside(directory: Path, suffix: str) -> Path:
    """Returns where a directory is during its exchange."""
    return directory.with_name(f".{directory.name}{suffix}")


def exchange(directory: Path) -> None:
    """Puts something finished into its place. Can be repeated after a crash at any point."""
    new, old = beside(directory, NEW), beside(directory, OLD)
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
    """Deletes what was in the place of something new. What a user put into a stage's directory
    moves on into the new one."""
    if (old / "stage.json").is_file():
        for path in old.iterdir():
            own = path.name in _OURS or path.name.startswith(".") or path.suffix == ".part"
            if not own and not os.path.lexists(new / path.name):
                path.rename(new / path.name)
    shutil.rmtree(old)
