"""Recipes: what a run is, in one TOML file."""

from greedy.recipes.loader import (
    departures,
    describe,
    from_document,
    load,
    names,
    network_label,
    to_toml,
)
from greedy.recipes.schema import (
    Data,
    Loss,
    Model,
    Paper,
    Recipe,
    Store,
    Training,
    differences,
    result_fields,
)

__all__ = [
    "Recipe",
    "Data",
    "Model",
    "Loss",
    "Training",
    "Store",
    "Paper",
    "load",
    "from_document",
    "to_toml",
    "names",
    "describe",
    "departures",
    "network_label",
    "result_fields",
    "differences",
]
