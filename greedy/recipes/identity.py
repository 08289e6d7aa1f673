"""The fields of a recipe that decide a run's result, and where two recipes differ in them."""

from typing import Any, Final

from pydantic import BaseModel

from greedy.base.files import canonical_json, digest
from greedy.recipes.schema import Data, Loss, Model, Recipe, Training

FREE_FIELDS: Final = {
    *("max_pixels", "num_workers"),
    *("compile", "deterministic", "test_every", "checkpoint_minutes"),
}
_LATER: Final[dict[type[BaseModel], tuple[str, ...]]] = {
    Data: ("background", "broken", "max_pixels", "transforms", "mixup", "mixup_alpha"),
    Loss: ("auxiliary", "label_smoothing", "class_weights"),
    Model: ("stages",),
    Training: (
        *("exact", "optimizer", "momentum", "nesterov", "weight_decay"),
        *("schedule", "warmup_epochs", "gradient_clip"),
    ),
}
LATER_FIELDS: Final[dict[str, Any]] = {
    f"{section.__name__.lower()}.{field}": section.model_fields[field].default
    for section, fields in _LATER.items()
    for field in fields
}

_FORMER_NAMES = {
    "store.reuse": "store.refresh_every"
}  # under which digests of older runs have them


def result_fields(recipe: Recipe) -> dict[str, Any]:
    """Returns the fields that decide a run's result, as ``section.field`` -> value. The others may
    change at any time: name, paper, checkpoints, the store's compressor, budgets, ``keep``, and
    what only changes a last digit, as another device does. Fields that later versions added are
    left out at their default, so that older runs keep their digest."""
    document, free = recipe.model_dump(), FREE_FIELDS
    if recipe.data.broken == "skip":  # larger images are among those that are skipped
        free = free - {"max_pixels"}
    whole = {
        f"{section}.{field}": value
        for section in ("data", "model", "loss", "training")
        for field, value in document[section].items()
        if field not in free and (f"{section}.{field}", value) not in LATER_FIELDS.items()
    }
    store = {f"store.{field}": document["store"][field] for field in ("views", "reuse", "encoding")}
    return {"seed": recipe.seed, **whole, **store}


def recipe_digest(recipe: Recipe) -> str:
    """Returns the digest of ``result_fields``."""
    fields = result_fields(recipe)
    fields.pop("data.transforms", None)  # older versions left it out; stage 0's lineage has it
    for name, former in _FORMER_NAMES.items():
        fields[former] = fields.pop(name)
    return digest(canonical_json(fields))


def differences(a: Recipe, b: Recipe) -> list[tuple[str, Any, Any]]:
    """Returns the result fields in which two recipes differ, as (key, value in a, value in b)."""
    of_a, of_b = LATER_FIELDS | result_fields(a), LATER_FIELDS | result_fields(b)
    return [(key, value, of_b[key]) for key, value in of_a.items() if value != of_b[key]]
