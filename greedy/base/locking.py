"""The lock by which only one process at a time writes into a run."""

import errno
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout

from greedy.base.disk_space import READ_ONLY, remedy
from greedy.base.errors import UserError
from greedy.base.files import read_document
from greedy.cache.files import write_whole

LOCK, HOLDER = ".lock", ".lock.json"
_held: set[Path] = set()  # lock files that this process holds


class RunLock:
    """The operating system's lock on a run directory, released when its process ends.

    The holder may enter again. The lock file is empty and stays; while it is held, a second file
    names the holder.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._lock = FileLock(directory / LOCK, blocking=False)

    @contextmanager
    def held(self) -> Iterator[bool]:
        """Holds the lock inside the block and yields whether this is the outermost block. Raises
        ``UserError`` naming the holder if that is another process, or if the directory is missing
        or read-only."""
        if not self._directory.is_dir():
            raise UserError(f"there is no run in {self._directory} yet: give it its data first")
        first = not self._lock.is_locked
        try:
            self._lock.acquire()
        except Timeout:
            raise UserError(
                f"{self._directory} is in use {_described(self._directory)}: wait until it is "
                f"done, or stop it; commands that only read work meanwhile"
            ) from None
        except OSError as error:
            if error.errno in READ_ONLY:
                begun = (self._directory / "run.toml").exists()
                copied = "copy the run to where you may write, and give that as --run"
                advice = copied if begun else "choose another place with --run"
                raise UserError(f"{self._directory} is read-only: {advice}") from error
            if (way_out := remedy(error)) is None:
                raise
            then = "that as --run" if error.errno == errno.ENOLCK else "the same command again"
            raise UserError(
                f"{self._directory} cannot be locked against other processes ({error.strerror}): "
                f"{way_out}, and give {then}"
            ) from error
        try:
            if first:
                _held.add(self._directory / LOCK)
                self._announce()
            yield first
        finally:
            if first:
                _held.discard(self._directory / LOCK)
                (self._directory / HOLDER).unlink(missing_ok=True)
            self._lock.release()

    def _announce(self) -> None:
        since = datetime.now().astimezone().isoformat(" ", "seconds")
        holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": since}
        with suppress(OSError):  # as on a full disk: the lock works without naming its holder
            write_whole(self._directory / HOLDER, json.dumps(holder).encode())


def _let_go() -> None:
    """Closes the lock files in a forked process, which would hold the locks as long as it lives,
    even when the process that took them has ended."""
    for path in _held:
        with suppress(OSError):
            held = path.stat()
            for descriptor in (int(entry.name) for entry in Path("/dev/fd").iterdir()):
                with suppress(OSError):  # as of the list itself
                    if os.path.samestat(os.fstat(descriptor), held):
                        os.close(descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)


def _described(directory: Path) -> str:
    """Returns the holder in words, as far as its file names it."""
    try:
        holder = read_document(directory / HOLDER)
        pid, host, since = (str(holder[key])[:100] for key in ("pid", "host", "since"))
    except (OSError, ValueError, KeyError):
        return "by another process"
    return f"by process {pid} on {host} since {since}"
