"""A network cut into stages, with what its stages are trained by."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from torch import nn

from greedy.build.modules import checked_shapes
from greedy.losses import LocalLoss
from greedy.losses.strategies import stage_losses
from greedy.models import Shape, Stage, StageShapes, cut
from greedy.recipes import Recipe


@dataclass(frozen=True)
class CutNetwork:
    """A network as all planning and training sees it.

    Attributes:
        stages: in order; they stay as they are.
        shapes: of a row along each stage.
        loss: the local loss of every stage but the output layer.
        classes: how many there are.
    """

    stages: Sequence[Stage]
    shapes: Sequence[StageShapes]
    loss: LocalLoss
    classes: int

    @classmethod
    def of(
        cls, recipe: Recipe, network: nn.Sequential, image: Shape, classes: int, loss: LocalLoss
    ) -> Self:
        """Cuts a network for images (C, H, W) as the recipe says. With 0 ``classes``, which are
        then not known yet, it has as many as it gives logits.

        Raises ``UserError`` for a network that does not fit the images or the recipe."""
        stages = cut(network, recipe.model.stage_layers)
        shapes = checked_shapes(recipe, stages, image, classes)
        return cls(stages, shapes, loss, classes or shapes[-1].output[0])

    def __len__(self) -> int:
        """The number of stages."""
        return len(self.stages)

    def name(self, number: int) -> str:
        """The name of stage ``number``, as in a plan."""
        return "output" if number == len(self) else self.stages[number - 1].name

    def losses(self, strategy: str) -> list[LocalLoss]:
        """The loss of each stage under a strategy of that name."""
        return stage_losses(strategy, self.loss, len(self))
