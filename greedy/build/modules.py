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
from greedy.data import Augmentation
from greedy.losses import Glob, LocalLoss, Pred, PredBio, PredSim, PredSimBio, Sim, SimBio
from greedy.losses.prediction import PLAIN, CrossEntropy
from greedy.models import ENCODERS, Shape, Stage, StageShapes, seeded
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


def checked_shapes(
    recipe: Recipe, stages: Sequence[Stage], row_shape: Shape, classes: int
) -> list[StageShapes]:
    """Returns the shapes along the stages. Raises ``UserError`` for a network that does not fit the
    data (0 classes: unknown yet) or the recipe."""
    shapes = models.shapes(stages, row_shape)
    if classes == 1:
        raise UserError("the data have one class: give images of two classes or more")
    output = shapes[-1].output
    if len(output) != 1:
        raise UserError(
            f"the network ends in {_kind(output)} ({_sides(output)} an image): "
            f"end it with the linear layer that gives the logits"
        )
    if classes:
        require_one_logit_a_class(output, classes)
    weights = recipe.loss.class_weights
    if isinstance(weights, list) and len(weights) != output[0]:
        raise UserError(
            f"loss.class_weights has {len(weights)} entries and the data have {output[0]} classes: "
            f"give one a class, or balanced"
        )
    for stage, shape in zip(stages[:-1], shapes[:-1], strict=True):
        _require_heads_and_store(recipe, stage, shape)
    augmentation = Augmentation.parse(recipe.data.augmentation, recipe.data.cutout_length)
    augmentation.require_image_size(*row_shape[1:])
    augmentation.require_channels(row_shape[0])
    mean = recipe.data.mean
    if mean is not None and len(mean) != row_shape[0]:
        raise UserError(
            f"data.mean has {len(mean)} entries and the images {row_shape[0]} channels: "
            f"give data.mean and data.std one a channel, or leave them out to be measured"
        )
    strategy = recipe.training.strategy
    is_local = strategy in ("greedy", "joint")
    if is_local and not any(p.requires_grad for p in stages[-1].parameters()):
        raise UserError(
            f"stage {len(stages)}, the output layer, has nothing to train: let its weights require "
            f"gradients"
        )
    if recipe.loss.name == "glob" and is_local:
        raise UserError(
            f"glob is no local loss, and {strategy} training needs one: set loss.name, or give "
            f"--strategy backprop"
        )
    _require_mixable(recipe)
    for field in ("epochs", "learning_rate"):
        value = getattr(recipe.training, field)
        if isinstance(value, list) and len(value) != len(stages):
            raise UserError(
                f"training.{field} has {len(value)} entries and the network {len(stages)} "
                f"stages: give one number, or one a stage"
            )
    return shapes


def _require_mixable(recipe: Recipe) -> None:
    """Raises ``UserError`` for mixed labels where a loss cannot take them, or where what they are
    mixed for is not trained as a whole."""
    mixup, strategy, loss = recipe.data.mixup, recipe.training.strategy, recipe.loss.name
    if mixup == "none" or (strategy == "backprop" and recipe.training.accumulate == 1):
        return
    if mixup == "manifold":
        raise UserError(
            "data.mixup is manifold, which mixes within a network that is trained as a whole, a "
            "batch at a time: set training.strategy to backprop and training.accumulate to 1, or "
            "data.mixup to input"
        )
    if strategy == "glob+sim" or (strategy != "backprop" and loss not in ("pred", "python")):
        named = strategy if strategy == "glob+sim" else loss
        raise UserError(
            f"data.mixup mixes labels, and {named} needs one label a row: set loss.name to pred or "
            f"training.strategy to backprop, or data.mixup to none"
        )


def _require_heads_and_store(recipe: Recipe, stage: Stage, shape: StageShapes) -> None:
    """Raises ``UserError`` for a stage whose activation the losses of this package have no heads
    for, or whose output no store can hold."""
    strategy, loss = recipe.training.strategy, recipe.loss.name
    has_our_heads = strategy != "backprop" and loss not in ("python", "glob")
    stored = strategy == "greedy" and recipe.store.views != "live"
    for row, matters in ((shape.hidden, has_our_heads), (shape.output, stored)):
        if matters and not 1 <= len(row) <= 3:
            raise UserError(
                f"{_gives(stage, row)}, and stages are trained on features (F,), tokens "
                f"(T, D) and maps (C, H, W): let it end with what gives one of these"
            )
    last = [m for m in stage.layer.modules() if isinstance(m, ENCODERS)][-1]
    if not has_our_heads or len(shape.hidden) == 1:
        return
    if isinstance(last, nn.Conv1d) and shape.hidden[-1] != last.out_channels:
        raise UserError(
            f"{_gives(stage, shape.hidden)} by a 1-d convolution, and of two sides the last "
            f"are features: use nn.Conv2d with a kernel of height 1, or let the stage end with "
            f"what gives tokens (T, D)"
        )
    is_last = isinstance(last, nn.Linear) and shape.hidden[-1] == last.out_features
    if is_last and len(shape.hidden) == 3 and shape.hidden[0] != last.out_features:
        raise UserError(
            f"{_gives(stage, shape.hidden)} with features last, and of three sides the "
            f"first are features: let it end with what gives (C, H, W), or tokens (T, D)"
        )


def _gives(stage: Stage, shape: Shape) -> str:
    return f"stage {stage.number} ({stage.name}) gives {_sides(shape)} an image"


def _kind(shape: Shape) -> str:
    return "tokens" if len(shape) == 2 else "feature maps"


def _sides(shape: Shape) -> str:
    return "x".join(map(str, shape))


def require_one_logit_a_class(output: Shape, classes: int) -> None:
    """Raises ``UserError`` for a network whose output is not one logit for each of the classes."""
    if output != (classes,):
        raise UserError(
            f"the network ends in {_sides(output)} values and the data have {classes} "
            f"classes: let its last layer give one logit a class, or name all of them in the "
            f"training set's attribute `classes`"
        )


def load_network(model: Model, name: str | None, *, needed: bool = False) -> nn.Module | None:
    """Returns the network that the function called ``name`` returns, for a run whose network was
    built in Python or whose recipe names that function; ``None`` without a name, and for a network
    that is built from the recipe.

    Raises:
        UserError: the run has another network, or a function that is ``needed`` is not named.
    """
    from_function = is_function(model.network)
    if name is None:
        if needed and model.network == "python":
            raise UserError(NOT_NAMED)
        if needed and from_function:
            raise UserError(NOT_CALLED.format(model.network))
        return None
    if name == model.network and not from_function:
        return None
    if from_function and name != model.network:
        raise UserError(f"this run's network is {model.network}: give --model {model.network}")
    if not from_function and model.network != "python":
        raise UserError(f"this run's network is {model.network}: leave out --model {name}")
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
