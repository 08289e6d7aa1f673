"""The shapes of each stage's input, activation and output, found on the meta device."""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from greedy.base.errors import UserError, first_line
from greedy.models.skeleton import skeleton
from greedy.models.stages import Shape, Stage

ROWS = 2  # of the probe: batch norm needs two


@dataclass(frozen=True)
class StageShapes:
    """Shapes of one row.

    Attributes:
        input: of the stage's input.
        hidden: of its activation h.
        output: of its output as stored.
        operations: multiply-adds from input to output.
    """

    input: Shape
    hidden: Shape
    output: Shape
    operations: int


def _probe(stage: Stage, shape: Shape) -> tuple[Tensor, Tensor]:
    """Returns activation and output of ``ROWS`` rows, on the meta device. Modules that cannot go
    there, since they look at values or hold tensors as plain attributes, compute them. Both use
    copies: the stage may be a user's."""
    rows = torch.empty((ROWS, *shape), device="meta")
    try:
        return _activation_and_output(skeleton(stage), rows)
    except RuntimeError:
        tensors = [*stage.parameters(), *stage.buffers()]
        if any(tensor.is_meta for tensor in tensors):
            raise
        return _activation_and_output(
            deepcopy(stage), torch.zeros_like(rows, device=tensors[0].device)
        )


@torch.no_grad()
def _activation_and_output(stage: Stage, x: Tensor) -> tuple[Tensor, Tensor]:
    """Returns activation and output of a copied stage, in evaluation mode: batch statistics do not
    work on the meta device."""
    h = stage.eval().hidden(x)
    return h, stage.pool(h) if isinstance(h, Tensor) else h


def require_float32(stage: Stage) -> None:
    """Raises ``UserError`` for a stage with weights of another type than float32."""
    other = {p.dtype for p in stage.parameters() if p.is_floating_point()} - {torch.float32}
    if other:
        raise UserError(
            f"stage {stage.number} ({stage.name}) has weights of {other.pop()}, and images are "
            f"given as float32: call network.float() first, and choose training.precision for the "
            f"computation"
        )


def _require_tensor(stage: Stage, h: Any) -> None:
    if not isinstance(h, Tensor):
        raise UserError(
            f"stage {stage.number} ({stage.name}) gives a {type(h).__name__} where a tensor is "
            f"needed: put its last module into one of your own that returns the tensor"
        )


def _require_rows(stage: Stage, h: Tensor, out: Tensor) -> None:
    for given in (h, out):
        if len(given) != ROWS:
            raise UserError(
                f"stage {stage.number} ({stage.name}) gives {len(given)} rows for {ROWS} samples: "
                f"put what changes the number of rows and what restores it into one module"
            )


def shapes(stages: Sequence[Stage], input_shape: Shape) -> list[StageShapes]:
    """Returns the shapes along the stages for rows of ``input_shape``.

    Raises ``UserError`` naming the stage that cannot take the previous stage's output.
    """
    stage_shapes: list[StageShapes] = []
    shape = input_shape
    for stage in stages:
        try:
            with FlopCounterMode(display=False) as counter:
                h, out = _probe(stage, shape)
                _require_tensor(stage, h)
                _require_rows(stage, h, out)
        except UserError:
            raise
        except Exception as error:  # the module's own
            require_float32(stage)
            raise UserError(
                f"stage {stage.number} ({stage.name}) cannot take an input of shape "
                f"{'x'.join(map(str, shape))}: change the layer or the image size "
                f"(torch says: {first_line(error)})"
            ) from error
        operations = counter.get_total_flops() // (2 * ROWS)
        stage_shapes.append(
            StageShapes(shape, tuple(h.shape[1:]), tuple(out.shape[1:]), operations)
        )
        shape = stage_shapes[-1].output
    return stage_shapes
