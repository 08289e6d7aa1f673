"""What goes into and comes out of each stage, found without computing."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from greedy.errors import UserError
from greedy.models.stages import Shape, Stage


@dataclass(frozen=True)
class StageShapes:
    """Shapes of one row: the stage's input, its activation h, and its output as stored."""

    input: Shape
    hidden: Shape
    output: Shape


class _Probe(nn.Module):
    def __init__(self, stage: Stage) -> None:
        super().__init__()
        self.stage = stage

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.stage.hidden(x)
        return h, self.stage.pool(h)


def shapes(stages: Sequence[Stage], input_shape: Shape) -> list[StageShapes]:
    """The shapes along the stages for rows of ``input_shape``, on the meta device.

    Raises ``UserError`` naming the stage that cannot take what the one before it gives.
    """
    found = []
    shape = input_shape
    for stage in stages:
        probe = _Probe(stage)
        weights = {k: v.to("meta") for k, v in probe.state_dict(keep_vars=True).items()}
        try:
            h, out = torch.func.functional_call(
                probe, weights, (torch.empty((2, *shape), device="meta"),)
            )
        except (RuntimeError, ValueError) as error:
            raise UserError(
                f"stage {stage.number} ({stage.name}) cannot take an input of shape "
                f"{'x'.join(map(str, shape))}: change the layer or the image size "
                f"(torch says: {str(error).splitlines()[0]})"
            ) from error
        found.append(StageShapes(shape, tuple(h.shape[1:]), tuple(out.shape[1:])))
        shape = found[-1].output
    return found
