"""From the name of a data set to the data set."""

from contextlib import suppress
from pathlib import Path

from greedy.base.errors import UserError, unknown
from greedy.base.functions import is_function_name
from greedy.base.places import data_sets, expanded
from greedy.data.catalogue import DATASETS
from greedy.data.folder import load_folder
from greedy.data.images import AS_THEY_ARE, Reading
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
    reading: Reading = AS_THEY_ARE,
) -> Dataset:
    """The data set of a name of ``DATASETS``, of ``folder:PATH`` or of ``module:function``.

    Named data sets are looked for in ``data_dir``, by default the user's cache directory, and
    fetched into it if ``download`` is true. ``image_size`` (pixels) resizes the short side of a
    folder's images and crops the centre; ``reading`` says how its files are read. A function is
    called only if ``allow_function`` is true.
    Raises UserError, saying what to do, if the data set cannot be had.
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
        return load_vision(name, data_sets(data_dir), download)
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
    reading: Reading = AS_THEY_ARE,
) -> Dataset | None:
    """The data set of a name of ``DATASETS`` if it can be loaded without a download, or of a
    function if that is called; otherwise None."""
    if name in NAMES:
        with suppress(UserError):  # files that are damaged by now are none
            return load_vision(name, data_sets(data_dir), download=False)
    elif allow_function and is_function_name(name):
        return load_function(name, reading.background)
    return None


def folder_of(name: str) -> Path | None:
    """The folder that ``folder:PATH`` names; None for other names."""
    return expanded(Path(name.removeprefix(FOLDER))) if name.startswith(FOLDER) else None


def is_available(name: str, data_dir: str | Path | None = None) -> bool:
    """Whether the data set of a name of ``DATASETS`` can be loaded without a download."""
    if name not in NAMES:
        raise unknown("data set", name, NAMES)
    return is_present(name, data_sets(data_dir))
