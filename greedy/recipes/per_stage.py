"""A recipe's settings for one stage, and its encoding."""

from collections.abc import Sequence
from typing import Any

from greedy.recipes.schema import Recipe

AUTO_ENCODING = "uint8"  # docs/architecture.md, "Encodings", has the measurements


def encoding(recipe: Recipe) -> str:
    """Returns the encoding of the run's stores."""
    named = recipe.store.encoding
    return AUTO_ENCODING if named == "auto" else named


def for_stage(value: Any | Sequence[Any], number: int) -> Any:
    """Returns a setting for one stage: the list's entry, or the value that all stages share."""
    return value[number - 1] if isinstance(value, list) else value
