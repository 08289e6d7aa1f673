"""Free space on disk: checked before it is needed, and explained in one sentence where it lacks."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from greedy.base.errors import TrainingError
from greedy.base.sizes import format_size

READ_ONLY = (errno.EACCES, errno.EPERM, errno.EROFS)


def require_free_space(directory: Path, purpose: str, needed: int) -> None:
    """Raises ``TrainingError`` if the disk of a directory, which need not exist yet, has fewer than
    ``needed`` bytes free. ``purpose`` names what they are for."""
    absolute = directory.absolute()
    existing = next(path for path in (absolute, *absolute.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise TrainingError(
            f"{purpose} needs up to {format_size(needed)} in {directory} and {format_size(free)} "
            f"are free: free some and give the same command again"
        )


@contextmanager
def write_errors_explained(directory: Path, purpose: str, needed: int = 0) -> Iterator[None]:
    """Turns a file below ``directory`` that cannot be written inside the block into a
    ``TrainingError`` with its path and what to do. The message names ``purpose`` and ``needed``,
    the estimate in bytes. Errors of files elsewhere, such as those that a user's data set reads,
    pass unchanged."""
    try:
        yield
    except OSError as error:
        path = error.filename or directory
        if error.errno == errno.ENOSPC:
            free = format_size(shutil.disk_usage(directory).free)
            estimate = f", which needs up to {format_size(needed)}" if needed else ""
            raise TrainingError(
                f"the disk of {directory} is full while {purpose} is written{estimate}, and {free} "
                f"are free: free some and give the same command again, all that is finished is kept"
            ) from error
        if (advice := remedy(error)) is None or not _is_below(path, directory):
            raise
        raise TrainingError(
            f"{path} cannot be written ({error.strerror}): {advice}, and give the same command "
            f"again, all that is finished is kept"
        ) from error


def _is_below(path: object, directory: Path) -> bool:
    if not isinstance(path, str | bytes | os.PathLike):
        return False
    return Path(os.fsdecode(path)).absolute().is_relative_to(directory.absolute())


def remedy(error: OSError) -> str | None:
    """Returns what to do about an operating system's error, ``None`` where that is unknown."""
    remedies = {
        errno.ENOSPC: "free some space on its disk",
        errno.EDQUOT: "free some of your disk quota, or have it raised",
        errno.EFBIG: "raise the limit on the size of a file (ulimit -f unlimited), or use a file "
        "system that allows large files",
        errno.EMFILE: "raise the limit on open files (ulimit -n 1024)",
        errno.ENFILE: "close programs that hold many files open",
        errno.ENOLCK: "its file system has no locks, so mount it with them, or choose a place on a "
        "local disk",
        errno.EIO: "the disk could not read or write it, so look at the system's log, and copy "
        "what can be read to another disk",
        errno.ENAMETOOLONG: "choose a shorter name",
        errno.ELOOP: "replace the link by the file or folder it should lead to",
        errno.ENOENT: "make sure that the path is right",
        errno.ENOTDIR: "give a path in which only the last part is a file",
        errno.EISDIR: "give the path of a file, this is a folder",
        errno.ENOTEMPTY: "choose another place, or move away what is there",
    }
    read_only = "choose a place where you may write, or get that permission"
    return read_only if error.errno in READ_ONLY else remedies.get(error.errno or 0)
