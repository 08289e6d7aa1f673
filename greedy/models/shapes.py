"""What goes into and comes out of each stage, found without computing."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from greedy.errors import UserError
from greedy.models.stages import Shape, Stage

ROWS = 2  # of the probe: batch norm takes no single one


@dataclass(frozen=True)
class StageShapes:
    """Shapes of one row: the stage's input, its activation h, and its output as stored;
    ``operations`` are the multiply-adds from the first to the last."""

    input: Shape
    hidden: Shape
    output: Shape
    operations: int


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
        probe = _Probe(stage).eval()  # batch statistics are not for the meta device
        weights = {k: v.to("meta") for k, v in probe.state_dict(keep_vars=True).items()}
        rows = torch.empty((ROWS, *shape), device="meta")
        try:
            with FlopCounterMode(display=False) as counter:
                h, out = torch.func.functional_call(probe, weights, (rows,))
        except (RuntimeError, ValueError) as error:
            raise UserError(
                f"stage {stage.number} ({stage.name}) cannot take an input of shape "
                f"{'x'.join(map(str, shape))}: change the layer or the image size "
                f"(torch says: {str(error).splitlines()[0]})"
            ) from error
        operations = counter.get_total_flops() // (2 * ROWS)
        found.append(StageShapes(shape, tuple(h.shape[1:]), tuple(out.shape[1:]), operations))
        shape = found[-1].output
    return found
