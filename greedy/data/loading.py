"""From the name of a data set to the data set."""

from contextlib import suppress
from pathlib import Path

from platformdirs import user_cache_path

from greedy.data.catalogue import DATASETS
from greedy.data.folder import load_folder
from greedy.data.mapstyle import load_function
from greedy.data.splits import Dataset
from greedy.data.vision import is_present, load_vision
from greedy.errors import UserError, unknown
from greedy.functions import is_function_name

NAMES = [entry.name for entry in DATASETS]
FOLDER = "folder:"


def load_dataset(
    name: str,
    data_dir: str | Path | None = None,
    download: bool = False,
    image_size: int | None = None,
    allow_function: bool = False,
) -> Dataset:
    """The data set of a name of ``DATASETS``, of ``folder:PATH`` or of ``module:function``.

    Named data sets are looked for in ``data_dir``, by default the user's cache directory, and
    fetched into it if ``download`` is true. ``image_size`` (pixels) resizes the short side of a
    folder's images and crops the centre. A function is called only if ``allow_function`` is true.
    Raises UserError, saying what to do, if the data set cannot be had.
    """
    if name == FOLDER:
        raise UserError("folder: names no folder: say folder:PATH")
    if root := folder_of(name):
        return load_folder(name, root, image_size)
    if name not in NAMES and Path(name).is_dir():
        raise UserError(f"{name!r} is a folder and no name of a data set: say folder:{name}")
    if name not in NAMES and not is_function_name(name):
        raise unknown("data set", name, [*NAMES, "folder:PATH", "module:function"])
    if image_size is not None:
        raise UserError(f"data.image_size is for folder:PATH alone: remove it for {name}")
    if name in NAMES:
        return load_vision(name, _root(data_dir), download)
    if not allow_function:
        raise UserError(
            "a function named in a recipe is only called when the same name is given on the "
            f"command line: add --data {name}"
        )
    return load_function(name)


def find_dataset(
    name: str, data_dir: str | Path | None = None, *, allow_function: bool = False
) -> Dataset | None:
    """The data set of a name of ``DATASETS`` if it can be loaded without a download, or of a
    function if that is called; otherwise None."""
    if name in NAMES:
        with suppress(UserError):  # files that are damaged by now are none
            return load_vision(name, _root(data_dir), download=False)
    elif allow_function and is_function_name(name):
        return load_function(name)
    return None


def folder_of(name: str) -> Path | None:
    """The folder that ``folder:PATH`` names; None for other names."""
    return Path(name.removeprefix(FOLDER)).expanduser() if name.startswith(FOLDER) else None


def is_available(name: str, data_dir: str | Path | None = None) -> bool:
    """Whether the data set of a name of ``DATASETS`` can be loaded without a download."""
    if name not in NAMES:
        raise unknown("data set", name, NAMES)
    return is_present(name, _root(data_dir))


def _root(data_dir: str | Path | None) -> Path:
    return user_cache_path("greedy") / "data" if data_dir is None else Path(data_dir).expanduser()
