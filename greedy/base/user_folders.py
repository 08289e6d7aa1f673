"""Folders for what outlives a run: data sets, measurements of a machine, compiled code, chunks of
stores in object storage.

A container may run under any user id: without a name, without a home, or with a home that is not
writable. Such a user gets a private folder among the temporary files.
"""

import getpass
import logging
import os
import stat
import tempfile
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path

from platformdirs import user_cache_path, user_data_path

from greedy.base.errors import UserError

COMPILED = "TORCHINDUCTOR_CACHE_DIR"

_log = logging.getLogger(__name__)


def data_sets_dir(data_dir: str | Path | None = None) -> Path:
    """Returns the folder of named data sets: ``data_dir``, by default one in the user's cache."""
    return _of_user(user_cache_path, "data") if data_dir is None else expand_home(Path(data_dir))


def measurements_dir() -> Path:
    """Returns the folder of what ``greedy bench`` measured, in the user's data directory."""
    return _of_user(user_data_path, "calibration")


def chunks_dir() -> Path:
    """Returns the folder of chunks that were read from object storage, in the user's cache."""
    return _of_user(user_cache_path, "chunks")


def prepare_compiling() -> None:
    """Names a folder for torch's compiler, which otherwise names one by the user; older versions
    fail for a user without a name. Its advice to compute in TF32 is left out: matrix products,
    those of the losses included, never do."""
    warnings.filterwarnings("ignore", "TensorFloat32 tensor cores")
    if COMPILED in os.environ:
        return
    try:
        getpass.getuser()
    except (KeyError, OSError):
        os.environ[COMPILED] = str(_temporary() / "compiled")


def expand_home(path: Path) -> Path:
    """Returns a path with ``~`` expanded. Raises ``UserError`` where there is no such home."""
    try:
        return path.expanduser()
    except RuntimeError:
        raise UserError(f"{path}: there is no such home directory, give the whole path") from None


def _of_user(folder_of: Callable[[str], Path], name: str) -> Path:
    try:
        path = folder_of("greedy") / name
    except RuntimeError:  # there is no home; older versions of platformdirs leave a ~
        return _temporary() / name
    return path if path.is_absolute() and _serves(path) else _temporary() / name


def _serves(path: Path) -> bool:
    """Returns whether a folder is readable, or can be created. An existing one is only read:
    another user may have filled it."""
    if os.path.lexists(path):
        return os.access(path, os.R_OK | os.X_OK)
    parent = next(folder for folder in path.parents if os.path.lexists(folder))
    return os.access(parent, os.W_OK | os.X_OK)


@cache
def _temporary() -> Path:
    """Returns a private folder among the temporary files, and warns of it once. A folder that
    others can write to is not used, since they could put code there."""
    path = Path(tempfile.gettempdir()) / f"greedy-{os.getuid()}"
    try:
        path.mkdir(mode=0o700)
    except FileExistsError:
        status = path.lstat()
        is_own = stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid()
        if not is_own or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            path = Path(tempfile.mkdtemp(prefix="greedy-"))
    _log.warning(
        "no writable home directory: data sets, compiled code and measurements of this machine are "
        "kept in %s (set HOME to keep them elsewhere)",
        path,
    )
    return path
