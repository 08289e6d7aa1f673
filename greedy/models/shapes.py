"""What goes into and comes out of each stage, found without computing."""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from greedy.base.errors import UserError
from greedy.models.skeleton import skeleton
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


def _probed(stage: Stage, shape: Shape) -> tuple[Tensor, Tensor]:
    """Activation and output of some rows, on the meta device; computed for modules that cannot go
    there, since they look at numbers or hold tensors as plain attributes. Both with copies: the
    stage may be a user's own."""
    rows = torch.empty((ROWS, *shape), device="meta")
    try:
        return _passed(skeleton(stage), rows)
    except RuntimeError:
        held = [*stage.parameters(), *stage.buffers()]
        if any(tensor.is_meta for tensor in held):
            raise
        return _passed(deepcopy(stage), torch.zeros_like(rows, device=held[0].device))


@torch.no_grad()
def _passed(stage: Stage, x: Tensor) -> tuple[Tensor, Tensor]:
    """Activation and output of a copy, with running statistics: batch statistics are not for the
    meta device."""
    h = stage.eval().hidden(x)
    return h, stage.pool(h) if isinstance(h, Tensor) else h


def _require_tensor(stage: Stage, h: Any) -> None:
    if not isinstance(h, Tensor):
        raise UserError(
            f"stage {stage.number} ({stage.name}) gives a {type(h).__name__} where a tensor is "
            f"needed: put its last module into one of your own that returns the tensor"
        )


def shapes(stages: Sequence[Stage], input_shape: Shape) -> list[StageShapes]:
    """The shapes along the stages for rows of ``input_shape``.

    Raises ``UserError`` naming the stage that cannot take what the one before it gives.
    """
    found = []
    shape = input_shape
    for stage in stages:
        try:
            with FlopCounterMode(display=False) as counter:
                h, out = _probed(stage, shape)
                _require_tensor(stage, h)
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            raise UserError(
                f"stage {stage.number} ({stage.name}) cannot take an input of shape "
                f"{'x'.join(map(str, shape))}: change the layer or the image size "
                f"(torch says: {str(error).splitlines()[0]})"
            ) from error
        operations = counter.get_total_flops() // (2 * ROWS)
        found.append(StageShapes(shape, tuple(h.shape[1:]), tuple(out.shape[1:]), operations))
        shape = found[-1].output
    return found
