"""What a recipe says of one stage, and of what it leaves open."""

from collections.abc import Sequence
from typing import Any

from greedy.recipes.schema import Recipe

AUTO_ENCODING = "uint8"  # docs/architecture.md, "Encodings", has the measurements


def encoding(recipe: Recipe) -> str:
    """The encoding of the run's stores."""
    named = recipe.store.encoding
    return AUTO_ENCODING if named == "auto" else named


def for_stage(value: Any | Sequence[Any], number: int) -> Any:
    """A setting of the recipe for one stage: the same for all, or an entry of a list."""
    return value[number - 1] if isinstance(value, list) else value
