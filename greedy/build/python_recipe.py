"""The recipe of a network and a loss given in Python."""

from typing import Any, Final

from greedy.base.errors import UserError, unknown
from greedy.build.modules import loss_settings
from greedy.build.settings import TrainerSettings
from greedy.losses import LocalLoss
from greedy.recipes import Recipe, from_document
from greedy.recipes.schema import SECTIONS

OTHER_FIELDS: Final = {
    "memory_budget": ("memory", "budget"),
    "micro_batch": ("memory", "micro_batch"),
    "optimizer_state": ("memory", "optimizer_state"),
    "stage_layers": ("model", "stage_layers"),
}
FIELDS: Final[dict[str, tuple[str, str]]] = OTHER_FIELDS | {
    field: (section, field)
    for section in ("data", "training", "store")
    for field in SECTIONS[section].model_fields
    if field != "name"
}
"""The section and the name there of each setting but ``seed``."""


def python_recipe(settings: TrainerSettings, loss: LocalLoss) -> Recipe:
    """Returns the recipe of a network and a loss given in Python. Raises ``UserError`` for an
    unknown setting."""
    document: dict[str, Any] = {
        "data": {"name": "python"},
        "model": {"network": "python"},
        "loss": loss_settings(loss),
        "training": {"epochs": 100, "learning_rate": 5e-4},
        "memory": {},
        "store": {},
    }
    for name, value in settings.items():
        if name == "seed":
            document["seed"] = value
        elif name in FIELDS:
            section, field = FIELDS[name]
            document[section][field] = list(value) if isinstance(value, tuple) else value
        else:
            raise unknown("setting", name, [*FIELDS, "seed"])
    return from_document(document, name="python")


def require_optimizer(settings: TrainerSettings, optimizer: object) -> None:
    """Raises ``UserError`` where a user's optimiser is given and Adam's moments are asked to be in
    host memory."""
    if optimizer is not None and settings.get("optimizer_state") == "host":
        raise UserError(
            "optimizer_state='host' is for the Adam that is built in: leave out optimizer, or "
            "optimizer_state"
        )
