"""The versions a result was made with."""

import platform
from importlib.metadata import version


def versions() -> dict[str, str]:
    """Of Python and of the packages whose arithmetic or formats a result depends on."""
    packages = ("greedy", "torch", "numpy", "zarr", "numcodecs")
    return {"python": platform.python_version()} | {name: version(name) for name in packages}
