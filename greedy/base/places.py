"""Where what outlives a run is kept: data sets, what was measured of a machine, compiled code.

A container may run under any user id: without a name, without a home, or with one that cannot be
written. All this is then kept among temporary files, in a folder of that user alone.
"""

import getpass
import logging
import os
import stat
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

from platformdirs import user_cache_path, user_data_path

from greedy.base.errors import UserError

COMPILED = "TORCHINDUCTOR_CACHE_DIR"

_log = logging.getLogger(__name__)


def data_sets(data_dir: str | Path | None = None) -> Path:
    """The folder of named data sets: ``data_dir``, by default in the user's cache."""
    return _of_user(user_cache_path, "data") if data_dir is None else expanded(Path(data_dir))


def measurements() -> Path:
    """The folder of what ``greedy bench`` measured, among the user's data."""
    return _of_user(user_data_path, "calibration")


def prepare_compiling() -> None:
    """Torch's compiler names its folder of temporary files by the user. For one who has no name,
    older versions do not compile."""
    if COMPILED in os.environ:
        return
    try:
        getpass.getuser()
    except (KeyError, OSError):
        os.environ[COMPILED] = str(_temporary() / "compiled")


def expanded(path: Path) -> Path:
    """A path whose ``~`` stands for a home. Raises ``UserError`` where there is none."""
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
    """Whether a folder is there, or can be made. One that is there may have been filled by another
    user: it is for reading."""
    if os.path.lexists(path):
        return os.access(path, os.R_OK | os.X_OK)
    above = next(each for each in path.parents if os.path.lexists(each))
    return os.access(above, os.W_OK | os.X_OK)


@cache
def _temporary() -> Path:
    """Said once. Whoever could write there could put code there: a folder that is not this user's
    alone is not used."""
    path = Path(tempfile.gettempdir()) / f"greedy-{os.getuid()}"
    try:
        path.mkdir(mode=0o700)
    except FileExistsError:
        found = path.lstat()
        is_own = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid()
        if not is_own or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            path = Path(tempfile.mkdtemp(prefix="greedy-"))
    _log.warning(
        "no home directory that can be written: data sets, compiled code and what is measured of "
        "this machine are kept in %s (set HOME to keep them elsewhere)",
        path,
    )
    return path
