"""The recipe of a network and a loss given in Python."""

from typing import Any

from greedy.base.errors import UserError, unknown
from greedy.build.modules import loss_settings
from greedy.losses import LocalLoss
from greedy.recipes import Recipe, from_document
from greedy.recipes.schema import SECTIONS

OTHER_FIELDS = {
    "memory_budget": ("memory", "budget"),
    "micro_batch": ("memory", "micro_batch"),
    "optimizer_state": ("memory", "optimizer_state"),
    "stage_layers": ("model", "stage_layers"),
}


def python_recipe(settings: dict[str, Any], loss: LocalLoss) -> Recipe:
    """Returns the recipe with ``settings`` by their names without sections: fields of ``data``,
    ``training`` and ``store``, those of ``OTHER_FIELDS``, and ``seed``. Raises ``UserError`` for an
    unknown setting."""
    document: dict[str, Any] = {
        "data": {"name": "python"},
        "model": {"network": "python"},
        "loss": loss_settings(loss),
        "training": {"epochs": 100, "learning_rate": 5e-4},
        "memory": {},
        "store": {},
    }
    fields = OTHER_FIELDS | {
        field: (section, field)
        for section in ("data", "training", "store")
        for field in SECTIONS[section].model_fields
        if field != "name"
    }
    for name, value in settings.items():
        if name == "seed":
            document["seed"] = value
        elif name in fields:
            section, field = fields[name]
            document[section][field] = list(value) if isinstance(value, tuple) else value
        else:
            raise unknown("setting", name, [*fields, "seed"])
    return from_document(document, name="python")


def require_optimizer(settings: dict[str, Any], optimizer: object) -> None:
    """Raises ``UserError`` where a user's optimiser is given and Adam's moments are asked to be in
    host memory."""
    if optimizer is not None and settings.get("optimizer_state") == "host":
        raise UserError(
            "optimizer_state='host' is for the Adam that is built in: leave out optimizer, or "
            "optimizer_state"
        )
