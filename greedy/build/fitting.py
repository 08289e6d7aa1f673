"""Whether a network, its data and its recipe fit each other."""

from collections.abc import Sequence

from torch import nn

from greedy import models
from greedy.base.errors import UserError
from greedy.base.text import sides
from greedy.data import Augmentation
from greedy.models import ENCODERS, Shape, Stage, StageShapes
from greedy.recipes import Recipe


def checked_shapes(
    recipe: Recipe, stages: Sequence[Stage], row_shape: Shape, classes: int
) -> list[StageShapes]:
    """Returns the shapes along the stages. Raises ``UserError`` for a network that does not fit the
    data (0 classes: unknown yet) or the recipe."""
    shapes = models.shapes(stages, row_shape)
    _require_classes(recipe, shapes[-1].output, classes)
    for stage, shape in zip(stages[:-1], shapes[:-1], strict=True):
        _require_heads_and_store(recipe, stage, shape)
    _require_images(recipe, row_shape)
    _require_trained(recipe, stages)
    _require_mixable(recipe)
    return shapes


def require_one_logit_a_class(output: Shape, classes: int) -> None:
    """Raises ``UserError`` for a network whose output is not one logit for each of the classes."""
    if output != (classes,):
        raise UserError(
            f"the network ends in {sides(output)} values and the data have {classes} "
            f"classes: let its last layer give one logit a class, or name all of them in the "
            f"training set's attribute `classes`"
        )


def _require_classes(recipe: Recipe, output: Shape, classes: int) -> None:
    if classes == 1:
        raise UserError("the data have one class: give images of two classes or more")
    if len(output) != 1:
        kind = "tokens" if len(output) == 2 else "feature maps"
        raise UserError(
            f"the network ends in {kind} ({sides(output)} an image): "
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


def _require_images(recipe: Recipe, row_shape: Shape) -> None:
    """Raises ``UserError`` for images that the recipe cannot augment or normalise."""
    augmentation = Augmentation.parse(recipe.data.augmentation, recipe.data.cutout_length)
    augmentation.require_image_size(*row_shape[1:])
    augmentation.require_channels(row_shape[0])
    mean = recipe.data.mean
    if mean is not None and len(mean) != row_shape[0]:
        raise UserError(
            f"data.mean has {len(mean)} entries and the images {row_shape[0]} channels: "
            f"give data.mean and data.std one a channel, or leave them out to be measured"
        )


def _require_trained(recipe: Recipe, stages: Sequence[Stage]) -> None:
    """Raises ``UserError`` for stages that the recipe's strategy, loss and lists cannot train."""
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
    for field in ("epochs", "learning_rate"):
        value = getattr(recipe.training, field)
        if isinstance(value, list) and len(value) != len(stages):
            raise UserError(
                f"training.{field} has {len(value)} entries and the network {len(stages)} "
                f"stages: give one number, or one a stage"
            )


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
    return f"stage {stage.number} ({stage.name}) gives {sides(shape)} an image"
