"""A network cut into stages, with what its stages are trained by."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from torch import nn

from greedy.base.errors import UserError
from greedy.base.torch_private import has_hooks
from greedy.build.fitting import checked_shapes
from greedy.build.modules import build_cross_entropy
from greedy.build.trainable import require_separate, require_trainable
from greedy.build.trial import can_be_tried, require_repeatable, require_resumable
from greedy.losses import LocalLoss
from greedy.losses.prediction import PLAIN, CrossEntropy
from greedy.losses.strategies import stage_losses
from greedy.models import Shape, Stage, StageShapes, cut, division, sequential
from greedy.recipes import Model, Recipe

OUTPUT = "output"
"""The name of the last stage, whatever its layers."""


def cut_as(model: Model, network: nn.Sequential, image: Shape) -> list[Stage]:
    """Cuts a network for images (C, H, W) into the stages that a recipe says. Raises ``UserError``
    for a network that cannot be cut so."""
    if model.stages == "auto":
        return cut(network, model.stage_layers)
    return cut(network, division(network, model.stages, image))


@dataclass(frozen=True)
class CutNetwork:
    """A network that has been cut into stages.

    Attributes:
        stages: the stages, in order; they stay as they are.
        shapes: the shapes of a row before, in and after each stage.
        loss: the local loss of every stage but the output layer.
        classes: the number of classes.
        cross_entropy: the loss of logits.
    """

    stages: Sequence[Stage]
    shapes: Sequence[StageShapes]
    loss: LocalLoss
    classes: int
    cross_entropy: CrossEntropy = PLAIN

    @classmethod
    def of(
        cls, recipe: Recipe, network: nn.Module, image: Shape, classes: int, loss: LocalLoss
    ) -> Self:
        """Cuts a network that is still to be trained, for images (C, H, W), as the recipe says. If
        ``classes`` is 0, there are as many classes as logits. Balanced class weights are all 1,
        since no labels are known.

        Raises:
            UserError: the network cannot be trained, or does not fit the images or the recipe.
        """
        network = sequential(network, image)
        if has_hooks(network):
            raise UserError(
                "the network itself has hooks, which training its stages would not call: register "
                "them on its layers"
            )
        stages = cut_as(recipe.model, network, image)
        shapes = checked_shapes(recipe, stages, image, classes)
        for stage, shape in zip(stages, shapes, strict=True):
            require_trainable(stage, shape.input)
        if recipe.training.strategy == "greedy":
            require_separate(stages)
        classes = classes or shapes[-1].output[0]
        if can_be_tried(stages):
            require_repeatable(stages, image)
            require_resumable(loss, shapes[0].hidden, classes)
        return cls(stages, shapes, loss, classes, build_cross_entropy(recipe.loss, [1] * classes))

    def __len__(self) -> int:
        """Returns the number of stages."""
        return len(self.stages)

    def name(self, number: int) -> str:
        """Returns the name of stage ``number`` in plans and records."""
        return OUTPUT if number == len(self) else self.stages[number - 1].name

    def losses(self, strategy: str) -> list[LocalLoss]:
        """Returns the loss of each stage for a strategy, given by its name."""
        hidden = [shape.hidden for shape in self.shapes]
        return stage_losses(strategy, self.loss, hidden, self.cross_entropy)
