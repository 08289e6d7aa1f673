"""Networks and losses built from a recipe."""

import inspect
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import nn

from greedy import models
from greedy.base.errors import UserError
from greedy.base.functions import call_function
from greedy.losses import Glob, LocalLoss, Pred, PredBio, PredSim, PredSimBio, Sim, SimBio
from greedy.losses.prediction import PLAIN, CrossEntropy
from greedy.models import Shape, seeded
from greedy.recipes import Loss, Model, Recipe
from greedy.recipes.networks import NETWORK_FIELDS, is_function, is_library_network

NETWORKS: dict[str, Callable[..., nn.Sequential]] = {
    "mlp": models.mlp,
    "vgg8b": models.vgg8b,
    "vgg11b": models.vgg11b,
    "resnet32": partial(models.resnet, depth=32),
    "resnet110": partial(models.resnet, depth=110),
    "wrn-16-8": partial(models.wide_resnet, depth=16, widen_factor=8),
    "wrn-28-10": partial(models.wide_resnet, depth=28, widen_factor=10),
    "wrn-40-10": partial(models.wide_resnet, depth=40, widen_factor=10),
    "preact-resnet18": models.preact_resnet18,
}

LOSSES: dict[str, type[LocalLoss]] = {
    "pred": Pred,
    "sim": Sim,
    "predsim": PredSim,
    "pred-bio": PredBio,
    "sim-bio": SimBio,
    "predsim-bio": PredSimBio,
    "glob": Glob,
}
NOT_NAMED = (
    "this run's network was built in Python: name the function that returns it with --model "
    "module:function"
)
NOT_CALLED = (
    "this run's network is what {0} returns, and code is only run if you name it: add --model {0}"
)
LOSS_FIELDS = {  # fields of a recipe, and the losses' arguments
    "beta": "beta",
    "pred_pool_target": "pool_target",
    "pred_hidden_layers": "hidden_layers",
    "auxiliary": "auxiliary",
    "target_projection": "target_projection",
}


def build_network(
    model: Model, row_shape: Shape, num_classes: int, seed: int | None = None
) -> nn.Sequential:
    """Returns the recipe's network for images of ``row_shape`` (C, H, W), on the meta device: each
    stage gets its weights when it is trained.

    A network of torchvision or timm has its own first weights, which are drawn if a ``seed`` is
    given.

    Raises:
        UserError: the network is given in Python, it takes other images, or it lacks a setting.
    """
    if model.network == "python":
        raise UserError(NOT_NAMED)
    if is_function(model.network):
        raise UserError(NOT_CALLED.format(model.network))
    if is_library_network(model.network):
        _require_settings(model, ())
        return _library_network(model.network, row_shape, num_classes, seed)
    channels, height, width = row_shape
    if height != width:
        raise UserError(
            f"the images are {height}x{width} and {model.network} takes square ones: resize those "
            f"of folder:PATH by data.image_size, others in their data set's own transform"
        )
    build = NETWORKS[model.network]
    sizes = {"in_channels": channels, "image_size": height, "num_classes": num_classes}
    taken = _parameters(build)
    _require_settings(model, taken)
    given = sizes | model.model_dump(include=set(NETWORK_FIELDS))
    with torch.device("meta"):
        return build(**{name: given[name] for name in taken if name in given})


def _require_settings(model: Model, taken: Iterable[str]) -> None:
    """Raises ``UserError`` for a setting that the network does not have among those ``taken``."""
    for field in sorted(NETWORK_FIELDS.difference(taken)):
        value, default = getattr(model, field), Model.model_fields[field].default
        if value != default:
            raise UserError(
                f"model.{field} is {value}, and {model.network} has no such setting: leave it at "
                f"{default}"
            )


def _parameters(function: Callable[..., Any]) -> list[str]:
    return list(inspect.signature(function).parameters)


def _library_network(
    name: str, row_shape: Shape, num_classes: int, seed: int | None
) -> nn.Sequential:
    if seed is None:
        # Some cannot be built without numbers: these are built with them, and so are mistaken ones.
        with suppress(UserError), torch.device("meta"):
            return models.sequential(
                models.library_network(name, row_shape, num_classes), row_shape
            )
    with seeded(seed or 0, "network"):
        network = models.library_network(name, row_shape, num_classes)
    return models.sequential(network, row_shape)


def load_network(recipe: Recipe, name: str | None, *, needed: bool = False) -> nn.Module | None:
    """Returns the network that the function called ``name`` returns, for a run whose network was
    built in Python or whose recipe names that function; ``None`` without a name, and for a network
    that is built from the recipe. The function draws from the recipe's seed: a run that goes on has
    the same first weights.

    Raises:
        UserError: the run has another network, or a function that is ``needed`` is not named.
    """
    network_name = recipe.model.network
    from_function = is_function(network_name)
    if name is None:
        if needed and network_name == "python":
            raise UserError(NOT_NAMED)
        if needed and from_function:
            raise UserError(NOT_CALLED.format(network_name))
        return None
    if name == network_name and not from_function:
        return None
    if from_function and name != network_name:
        raise UserError(f"this run's network is {network_name}: give --model {network_name}")
    if not from_function and network_name != "python":
        raise UserError(f"this run's network is {network_name}: leave out --model {name}")
    with seeded(recipe.seed, "network"):
        network = call_function(name)
    if not isinstance(network, nn.Module):
        raise UserError(f"{name} must return an nn.Module, not a {type(network).__name__}")
    return network


def loss_settings(loss: LocalLoss) -> dict[str, str | float | int]:
    """Returns the recipe's ``loss`` section for a loss given in Python."""
    if getattr(loss, "cross_entropy", PLAIN) != PLAIN:
        raise UserError(
            "the cross-entropy is the same for the output layer and local losses: give "
            "label_smoothing and class_weights to the trainer"
        )
    names = [name for name, kind in LOSSES.items() if type(loss) is kind]
    if not names:
        return {"name": "python"}
    values = {field: getattr(loss, name) for field, name in _arguments(type(loss)).items()}
    return {"name": names[0], **values}


def build_loss(loss: Loss) -> LocalLoss:
    """Returns the recipe's local loss. Raises ``UserError`` for a loss written in Python."""
    if loss.name == "python":
        raise UserError(
            "this run's local loss was written in Python: continue the run from Python, as it began"
        )
    kind = LOSSES[loss.name]
    return kind(**{name: getattr(loss, field) for field, name in _arguments(kind).items()})


def build_cross_entropy(loss: Loss, rows: Sequence[int]) -> CrossEntropy:
    """Returns the recipe's cross-entropy. ``rows`` is the number of training rows of each class:
    balanced weights are inverse to it, with a mean over rows of 1, and 0 for classes without
    rows."""
    weights = loss.class_weights
    if weights == "balanced":
        share = sum(rows) / sum(count > 0 for count in rows)
        weights = [share / count if count else 0.0 for count in rows]
    return CrossEntropy(loss.label_smoothing, None if weights is None else tuple(weights))


def _arguments(kind: type[LocalLoss]) -> dict[str, str]:
    """Returns a loss's arguments by the fields of a recipe that set them."""
    parameters = _parameters(kind)
    return {field: name for field, name in LOSS_FIELDS.items() if name in parameters}
