"""Room on disk: asked for before it is needed, and missed in one sentence."""

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from greedy.errors import TrainingError
from greedy.sizes import format_size

FULL = (errno.ENOSPC, errno.EDQUOT)


def require_room(place: Path, what: str, needed: int) -> None:
    """Raises ``TrainingError`` if the disk of a directory, which may be yet to be made, has no room
    for so many bytes more."""
    standing = next(each for each in (place.absolute(), *place.absolute().parents) if each.exists())
    free = shutil.disk_usage(standing).free
    if free < needed:
        raise TrainingError(
            f"{what} needs up to {format_size(needed)} in {place} and {format_size(free)} are "
            f"free: free some and give the same command again"
        )


@contextmanager
def until_full(place: Path, what: str, needed: int = 0) -> Iterator[None]:
    """Inside, a disk that is full ends in one sentence. ``needed`` bytes were thought enough."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        free = format_size(shutil.disk_usage(place).free)
        wanted = f", which needs up to {format_size(needed)}" if needed else ""
        raise TrainingError(
            f"the disk of {place} is full while {what} is written{wanted}, and {free} are free: "
            f"free some and give the same command again, all that is finished is kept"
        ) from error
