"""3x3 convolutions of small maps as matrix products.

On CPUs with AMX, a bfloat16 step of 512 maps of 4x4 runs at a seventh of the rate of matrix
products, as oneDNN computes its convolutions (docs/results.md). Here the maps are unfolded: the
neighbourhoods of all positions become the rows of a matrix, and the convolution and both of its
gradients become products with it. Where maps are larger, or fewer, unfolding costs more than it
saves.
"""

from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from greedy.base.torch_private import has_amx, is_usual_autograd
from greedy.exact.layers import LayerCall
from greedy.models import Shape

SIDE = 4  # of the largest maps that are unfolded
CHANNELS = 256  # at least, at the input and at the output
UNFOLDED_VALUES = 2**23  # at a time, 16 MiB


def unfolds(hidden: Shape, precision: str, device_type: str) -> bool:
    """Returns whether a stage may unfold maps: in bfloat16 on a CPU with AMX, if a row of its
    activation is of a shape ``hidden`` with many small maps. A choice by timing would differ
    between two equal runs."""
    are_small = len(hidden) == 3 and hidden[0] >= CHANNELS and max(hidden[1:]) <= SIDE
    return are_small and precision == "bfloat16" and device_type == "cpu" and has_amx()


class Unfolded(TorchFunctionMode):
    """A context in which 3x3 convolutions of small maps in bfloat16, and their gradients, are
    matrix products. Others are computed as ever."""

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if function is torch.conv2d:
            call = LayerCall(*args, **kwargs)
            is_usual = _fits_together(call) and is_usual_autograd()
            if is_usual and _suits(call, _precision(call)):
                matrix = _matrix(call.weight.to(torch.bfloat16))
                return _Convolution.apply(call.input.to(torch.bfloat16), matrix, call.bias)
        elif function is torch.ops.aten.convolution_backward:
            back = _Backward(*args, **kwargs)
            if not back.transposed and _suits(back.call, back.g.dtype):
                return back.by_products()
        return function(*args, **kwargs)


class _Backward(NamedTuple):
    """The arguments of ``convolution_backward``."""

    g: Tensor
    input: Tensor
    weight: Tensor
    bias_sizes: list[int] | None
    stride: Any
    padding: Any
    dilation: Any
    transposed: bool
    output_padding: Any
    groups: int
    output_mask: Any

    @property
    def call(self) -> LayerCall:
        """The convolution's."""
        geometry = self.stride, self.padding, self.dilation
        return LayerCall(self.input, self.weight, None, *geometry, self.groups)

    def by_products(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Returns the gradients of input, weight and bias, each if it is wanted."""
        g, x, wanted = self.g, self.input, self.output_mask
        return (
            _input_gradient(g, _matrix(self.weight)) if wanted[0] else None,
            _weight(_matrix_gradient(x, g), x.shape[1]) if wanted[1] else None,
            g.sum((0, 2, 3)) if wanted[2] else None,
        )


def _precision(call: LayerCall) -> torch.dtype | None:
    """Returns the precision in which a convolution is computed here, ``None`` for one that is
    refused."""
    given = {tensor.dtype for tensor in call[:3] if tensor is not None}
    if torch.is_autocast_enabled("cpu") and given <= {torch.float32, torch.bfloat16}:
        return torch.get_autocast_dtype("cpu")
    return given.pop() if len(given) == 1 else None


def _fits_together(call: LayerCall) -> bool:
    """Returns whether sizes are as a convolution takes them; torch says what is wrong with
    others."""
    bias_fits = call.bias is None or call.bias.shape == call.weight.shape[:1]
    return call.input.dim() == 4 and call.input.shape[1] == call.weight.shape[1] and bias_fits


def _suits(call: LayerCall, precision: torch.dtype | None) -> bool:
    x, weight = call.input, call.weight
    return (
        precision == torch.bfloat16
        and x.device.type == "cpu"
        and len(x) > 0
        and max(x.shape[2:]) <= SIDE
        and weight.shape[2:] == (3, 3)
        and min(weight.shape[:2]) >= CHANNELS
        and call.geometry == [[1, 1]] * 3
        and call.groups == 1
    )


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, matrix: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, matrix)
        return _convolved(x, matrix, bias)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        (x, matrix), wanted = ctx.saved_tensors, ctx.needs_input_grad
        return (
            _input_gradient(g, matrix) if wanted[0] else None,
            _matrix_gradient(x, g) if wanted[1] else None,
            g.sum((0, 2, 3)) if wanted[2] else None,
        )


def _convolved(x: Tensor, matrix: Tensor, bias: Tensor | None = None) -> Tensor:
    """Returns the convolution (B, out, H, W) of maps (B, in, H, W) with a weight's matrix."""
    bias = None if bias is None else bias.to(x.dtype)
    parts = [F.linear(unfolded(part), matrix, bias) for part in _parts(x)]
    out = parts[0] if len(parts) == 1 else torch.cat(parts)
    maps = out.view(len(x), *x.shape[2:], -1).permute(0, 3, 1, 2)
    # A tensor of its own, laid out as ever, which modules may change in place or look at flat.
    return maps.clone(memory_format=torch.contiguous_format)


def _input_gradient(g: Tensor, matrix: Tensor) -> Tensor:
    """Returns the gradient (B, in, H, W) of a convolution's input from that of its output: the
    convolution with the mirrored weight, whose inputs and outputs are exchanged."""
    taps = matrix.view(len(matrix), 9, -1).transpose(0, 1)  # (9, out, in)
    return _convolved(g, taps.flip(0).flatten(0, 1).T)


def _matrix_gradient(x: Tensor, g: Tensor) -> Tensor:
    """Returns the gradient (out, 9·in) of a weight's matrix from the convolution's input
    (B, in, H, W) and the gradient (B, out, H, W) of its output."""
    parts = zip(_parts(x), g.split(len(_parts(x)[0])), strict=True)
    products = (_positions(slope).T @ unfolded(part) for part, slope in parts)
    return reduce(lambda total, product: total.float() + product, products).to(x.dtype)


def _matrix(weight: Tensor) -> Tensor:
    """Returns a weight (out, in, 3, 3) as a matrix (out, 9·in) for the rows of ``unfolded``."""
    return weight.permute(0, 2, 3, 1).reshape(len(weight), -1)


def _weight(matrix: Tensor, channels: int) -> Tensor:
    """Returns the weight (out, in, 3, 3) of a matrix, given its number of input channels."""
    return matrix.view(len(matrix), 3, 3, channels).permute(0, 3, 1, 2)


def unfolded(x: Tensor) -> Tensor:
    """Returns the 3x3 neighbourhood of each position of maps (B, C, H, W), zeros outside of them,
    as a matrix (B·H·W, 9·C)."""
    padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))
    neighbourhoods = padded.unfold(1, 3, 1).unfold(2, 3, 1)  # (B, H, W, C, 3, 3)
    return neighbourhoods.permute(0, 1, 2, 4, 5, 3).reshape(-1, 9 * x.shape[1])


def _positions(x: Tensor) -> Tensor:
    """Returns the positions of maps (B, C, H, W) as a matrix (B·H·W, C)."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def _parts(x: Tensor) -> Sequence[Tensor]:
    """Returns maps (B, C, H, W) in parts that are unfolded at a time."""
    return x.split(max(1, UNFOLDED_VALUES // (9 * x[0].numel())))
