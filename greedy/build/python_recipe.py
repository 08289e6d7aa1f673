"""The recipe of a network and a loss given in Python."""

from typing import Any, Final

from greedy.base.errors import UserError, unknown
from greedy.build.modules import build_loss, loss_settings
from greedy.build.settings import TrainerSettings
from greedy.losses import LocalLoss, PredSim, require_local_loss
from greedy.recipes import Recipe, from_document
from greedy.recipes.schema import SECTIONS

OTHER_FIELDS: Final = {
    "memory_budget": ("memory", "budget"),
    "micro_batch": ("memory", "micro_batch"),
    "optimizer_state": ("memory", "optimizer_state"),
    "store_cache": ("store", "cache"),
    "stage_layers": ("model", "stage_layers"),
    "stages": ("model", "stages"),
    "label_smoothing": ("loss", "label_smoothing"),
    "class_weights": ("loss", "class_weights"),
}
FIELDS: Final[dict[str, tuple[str, str]]] = OTHER_FIELDS | {
    field: (section, field)
    for section in ("data", "training", "store")
    for field in SECTIONS[section].model_fields
    if field not in ("name", "optimizer", "cache")
}
"""The section and the name there of each setting but ``seed`` and ``optimizer``."""


def recipe_and_loss(
    recipe: Recipe | None, loss: LocalLoss | None, optimizer: object, settings: TrainerSettings
) -> tuple[Recipe, LocalLoss]:
    """Returns a recipe and the loss that it names; without one the recipe of the loss, by default
    ``PredSim``, the settings and the optimiser, a name or the user's own. Raises ``UserError`` for
    what does not go together."""
    if recipe is not None:
        _require_recipe_alone(loss, optimizer, settings)
        return recipe, build_loss(recipe.loss)
    loss = PredSim() if loss is None else loss
    require_local_loss(loss)
    if optimizer is not None and not isinstance(optimizer, str):
        _require_optimizer(settings)
        optimizer = None
    return python_recipe(settings, loss, optimizer), loss


def python_recipe(
    settings: TrainerSettings, loss: LocalLoss, optimizer: str | None = None
) -> Recipe:
    """Returns the recipe of a network, a loss and perhaps the name of an optimiser given in Python.
    Raises ``UserError`` for an unknown setting."""
    document: dict[str, Any] = {
        "data": {"name": "python"},
        "model": {"network": "python"},
        "loss": loss_settings(loss),
        "training": {"epochs": 100, "learning_rate": 5e-4},
        "memory": {},
        "store": {},
    }
    if optimizer is not None:
        document["training"]["optimizer"] = optimizer
    for name, value in settings.items():
        if name == "seed":
            document["seed"] = value
        elif name in FIELDS:
            section, field = FIELDS[name]
            document[section][field] = list(value) if isinstance(value, tuple) else value
        else:
            raise unknown("setting", name, [*FIELDS, "seed"])
    return from_document(document, name="python")


def _require_optimizer(settings: TrainerSettings) -> None:
    """Raises ``UserError`` for settings of the optimisers that are built in, given with a user's
    own."""
    names = ("optimizer_state", "momentum", "nesterov", "weight_decay")
    if given := [name for name in names if settings.get(name) not in (None, "device")]:
        raise UserError(
            f"{' and '.join(given)} is for optimisers that are built in: leave it out, or name one "
            f"of them, as in optimizer='adam'"
        )


def _require_recipe_alone(loss: object, optimizer: object, settings: TrainerSettings) -> None:
    """Raises ``UserError`` for a loss, an optimiser or settings that are given besides a recipe."""
    given = {"loss": loss, "optimizer": optimizer, **settings}
    if names := [name for name, value in given.items() if value is not None]:
        raise UserError(
            f"a recipe has its own loss and settings: leave out {', '.join(names)}, or change the "
            f"recipe"
        )
