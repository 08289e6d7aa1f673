"""Which packages are installed; all else is in pyproject.toml.

`cache/` and `cli/` stand at the top of the checkout but install inside the package, so that no
other project's module of that name can shadow them. Folders of data count as packages.
"""

from setuptools import find_namespace_packages, setup

ROOMS = find_namespace_packages(include=["greedy", "greedy.*"])

setup(packages=[*ROOMS, "greedy.cache", "greedy.cli"])
