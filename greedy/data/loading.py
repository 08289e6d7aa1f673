"""Data sets loaded by name."""

from contextlib import suppress
from pathlib import Path

from greedy.base.errors import UserError, unknown
from greedy.base.functions import is_function_name
from greedy.base.user_folders import data_sets_dir, expand_home
from greedy.data.catalogue import DATASETS
from greedy.data.folder import load_folder
from greedy.data.images import DEFAULT_READING, Reading
from greedy.data.mapstyle import load_function
from greedy.data.splits import Dataset
from greedy.data.vision import is_present, load_vision

NAMES = [entry.name for entry in DATASETS]
FOLDER = "folder:"


def load_dataset(
    name: str,
    data_dir: str | Path | None = None,
    download: bool = False,
    image_size: int | None = None,
    allow_function: bool = False,
    reading: Reading = DEFAULT_READING,
) -> Dataset:
    """Returns the data set called by a name of ``DATASETS``, ``folder:PATH`` or
    ``module:function``.

    Args:
        data_dir: the folder of named data sets, by default in the user's cache.
        download: allow fetching a named data set into it.
        image_size: pixels to which a folder's images are resized on the short side and cropped.
        allow_function: allow calling a function.
        reading: how a folder's files are read.

    Raises ``UserError``, saying what to do, if the data set cannot be loaded.
    """
    if name == FOLDER:
        raise UserError("folder: names no folder: say folder:PATH")
    if root := folder_of(name):
        return load_folder(name, root, image_size, reading)
    if name not in NAMES and Path(name).is_dir():
        raise UserError(f"{name!r} is a folder and no name of a data set: say folder:{name}")
    if name not in NAMES and not is_function_name(name):
        raise unknown("data set", name, [*NAMES, "folder:PATH", "module:function"])
    if image_size is not None:
        raise UserError(f"data.image_size is for folder:PATH alone: remove it for {name}")
    if name in NAMES:
        return load_vision(name, data_sets_dir(data_dir), download)
    if not allow_function:
        raise UserError(
            "a function named in a recipe is only called when the same name is given on the "
            f"command line: add --data {name}"
        )
    return load_function(name, reading.background)


def find_dataset(
    name: str,
    data_dir: str | Path | None = None,
    *,
    allow_function: bool = False,
    reading: Reading = DEFAULT_READING,
) -> Dataset | None:
    """Returns the data set of a name of ``DATASETS`` if it loads without a download, or of a
    function if calling it is allowed; otherwise None."""
    if name in NAMES:
        with suppress(UserError):  # damaged files count as missing
            return load_vision(name, data_sets_dir(data_dir), download=False)
    elif allow_function and is_function_name(name):
        return load_function(name, reading.background)
    return None


def folder_of(name: str) -> Path | None:
    """Returns the folder of ``folder:PATH``; None for other names."""
    return expand_home(Path(name.removeprefix(FOLDER))) if name.startswith(FOLDER) else None


def is_available(name: str, data_dir: str | Path | None = None) -> bool:
    """Returns whether the data set of a name of ``DATASETS`` can be loaded without a download."""
    if name not in NAMES:
        raise unknown("data set", name, NAMES)
    return is_present(name, data_sets_dir(data_dir))
