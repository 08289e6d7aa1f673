"""The versions a result was made with."""

import platform
from importlib.metadata import version

DISTRIBUTION = "greedy-train"  # as pyproject.toml has it


def versions() -> dict[str, str]:
    """Returns versions by name: of Python and of the packages whose arithmetic or formats a result
    depends on."""
    own = {"python": platform.python_version(), "greedy": version(DISTRIBUTION)}
    return own | {name: version(name) for name in ("torch", "numpy", "zarr", "numcodecs")}
