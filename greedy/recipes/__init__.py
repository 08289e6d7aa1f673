"""Recipes: a run described in one TOML file."""

from greedy.recipes.identity import differences, recipe_digest, result_fields
from greedy.recipes.loader import (
    departures,
    describe,
    from_document,
    load,
    loss_label,
    names,
    network_label,
    of_table,
    summary,
    to_toml,
)
from greedy.recipes.schema import Data, Loss, Memory, Model, Paper, Recipe, Store, Training

__all__ = [
    "Recipe",
    "Data",
    "Model",
    "Loss",
    "Training",
    "Memory",
    "Store",
    "Paper",
    "load",
    "from_document",
    "to_toml",
    "names",
    "describe",
    "summary",
    "departures",
    "of_table",
    "network_label",
    "loss_label",
    "recipe_digest",
    "result_fields",
    "differences",
]
