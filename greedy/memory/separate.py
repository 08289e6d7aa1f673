"""Whether the samples of a stage meet in batch norms alone, so that it has all memory modes."""

from collections.abc import Callable, Sequence
from copy import deepcopy
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn

from greedy.base.errors import UserError, first_line
from greedy.exact import step
from greedy.exact.schedule import learn
from greedy.losses import LocalLoss, make_heads
from greedy.models import Shape, Stage, StageShapes
from greedy.steps.parts import parts_of

ROWS = 2
SIDE, WIDTH = 8, 8  # of small maps, and of what small heads take

Module = TypeVar("Module", bound=nn.Module)


def why_plain(stage: Stage, shapes: StageShapes, loss: LocalLoss, num_classes: int) -> str:
    """Returns why a stage has no memory mode but ``plain``: samples meet in it or in its heads, or
    it computes something else when it is called again. Empty if it has all modes.

    Copies on the CPU compute two rows, with random weights: where a weight is 0, nothing meets.
    Maps and heads are made small for it where the modules allow that.
    """
    with torch.device("meta"):
        heads = make_heads(loss, shapes.hidden, num_classes)
    if parts_of(stage, heads, shapes.hidden) is not None:
        return ""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        small = [_small_map(shapes.input), shapes.input]
        narrow = [tuple(min(WIDTH, side) for side in shapes.hidden), shapes.hidden]
        in_layer = _first(partial(_try_layer, stage), small)
        return in_layer or _first(partial(_try_heads, loss, num_classes), narrow)


def _first(attempt: Callable[[Shape], None], shapes: Sequence[Shape]) -> str:
    """Returns why the first attempt that does not fail for its shape fails; empty if none does."""
    for shape in shapes:
        try:
            attempt(shape)
        except UserError as error:
            return str(error).partition(": ")[0]
        except Exception as error:  # the module's own
            reason = first_line(error)
        else:
            return ""
    return reason


def _try_layer(stage: Stage, shape: Shape) -> None:
    x = torch.randn((ROWS, *shape))
    step(_drawn(stage.layer), _squared, stage.arranged(x), None, 1)


def _try_heads(loss: LocalLoss, num_classes: int, shape: Shape) -> None:
    h = torch.randn((ROWS, *shape), requires_grad=True)
    learn(_drawn(loss.heads(shape, num_classes)), h, [True])


def _small_map(shape: Shape) -> Shape:
    if len(shape) < 3:
        return shape
    return (shape[0], *(min(SIDE, side) for side in shape[1:]))


def _drawn(module: Module) -> Module:
    """Returns a copy on the CPU in training mode with random weights."""
    memo: dict[int, object] = {}
    for parameter in module.parameters():
        values = torch.empty(parameter.shape, dtype=parameter.dtype)
        if parameter.dim() > 1:
            values.normal_(std=parameter[0].numel() ** -0.5)
        else:
            values.uniform_(0.5, 1.5)
        memo[id(parameter)] = nn.Parameter(values, parameter.requires_grad)
    for buffer in module.buffers():
        known = torch.zeros_like(buffer, device="cpu") if buffer.is_meta else buffer.cpu().clone()
        memo[id(buffer)] = known
    return deepcopy(module, memo).train()


def _squared(outputs: Tensor, _: None) -> Tensor:
    return outputs.square().sum()
