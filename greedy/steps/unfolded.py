"""3x3 convolutions of small maps as matrix products.

On CPUs with AMX, oneDNN computes a bfloat16 convolution of 512 maps of 4x4 at a third, and its
weight's gradient at a tenth, of the rate of matrix products (docs/results.md). Here the
neighbourhoods of all positions are laid out as the rows of a matrix, the maps are unfolded; the
convolution and both of its gradients are products with such a matrix. Larger maps, and fewer of
them, take longer to unfold than it saves.
"""

from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from greedy.exact.layers import Call

UNFOLDED_POSITIONS = 16  # of the largest maps that are unfolded, 4x4
UNFOLDED_CHANNELS = 256  # of the fewest of these maps at the input
UNFOLDED_VALUES = 2**23  # at a time, 16 MiB


class Unfolded(TorchFunctionMode):
    """A context in which 3x3 convolutions of small maps in bfloat16, and their gradients, are
    matrix products. Others are computed as ever."""

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if function is torch.conv2d:
            call = Call(*args, **kwargs)
            if _suits(call.input, call.weight, _precision(call.input), call.geometry, call.groups):
                x = call.input.to(torch.bfloat16)
                return _Convolution.apply(x, call.weight, call.bias)
        elif function is torch.ops.aten.convolution_backward:
            back = _Backward(*args, **kwargs)
            if _suits(back.input, back.weight, back.g.dtype, back.geometry, back.groups):
                matrix = _matrix(back.weight, back.g.dtype) if back.output_mask[0] else None
                return _gradients(back.g, back.input, matrix, back.output_mask)
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
    def geometry(self) -> list[Any]:
        return [list(s) for s in (self.stride, self.padding, self.dilation)]


def _precision(x: Tensor) -> torch.dtype:
    """Returns the precision in which a convolution of ``x`` is computed here."""
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype


def _suits(x: Tensor, weight: Tensor, dtype: torch.dtype, geometry: list[Any], groups: int) -> bool:
    return (
        dtype == torch.bfloat16
        and x.dim() == 4
        and x.shape[2] * x.shape[3] <= UNFOLDED_POSITIONS
        and x.shape[1] >= UNFOLDED_CHANNELS
        and weight.shape[2:] == (3, 3)
        and geometry == [[1, 1]] * 3
        and groups == 1
    )


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        matrix = _matrix(weight, x.dtype)
        ctx.save_for_backward(x, matrix)
        return _convolved(x, matrix, None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        x, matrix = ctx.saved_tensors
        return _gradients(g, x, matrix, ctx.needs_input_grad)


def _gradients(
    g: Tensor, x: Tensor, matrix: Tensor | None, needed: Any
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Returns the gradients of input, weight and bias, each if it is needed. That of the input is a
    convolution with the mirrored weight, whose inputs and outputs are exchanged."""
    return (
        _convolved(g, _mirrored(matrix)) if needed[0] and matrix is not None else None,
        _weight_gradient(x, g) if needed[1] else None,
        g.sum((0, 2, 3), dtype=torch.float32) if needed[2] else None,
    )


def _convolved(x: Tensor, matrix: Tensor, bias: Tensor | None = None) -> Tensor:
    """Returns the convolution (B, out, H, W) of maps (B, in, H, W) with a weight's matrix."""
    parts = [F.linear(unfolded(part), matrix, bias) for part in _parts(x)]
    out = parts[0] if len(parts) == 1 else torch.cat(parts)
    return out.view(len(x), *x.shape[2:], -1).permute(0, 3, 1, 2)


def _weight_gradient(x: Tensor, g: Tensor) -> Tensor:
    """Returns the gradient (out, in, 3, 3) of a convolution's weight from its input (B, in, H, W)
    and the gradient (B, out, H, W) of its output, in float32."""
    parts = zip(_parts(x), g.split(len(_parts(x)[0])), strict=True)
    products = (_positions(slope).T @ unfolded(part) for part, slope in parts)
    total = reduce(lambda total, product: total.float() + product, products)
    in_order = total.view(g.shape[1], 3, 3, x.shape[1]).permute(0, 3, 1, 2)
    return in_order.to(torch.float32, memory_format=torch.contiguous_format, copy=True)


def _matrix(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns a weight (out, in, 3, 3) as a matrix (out, 9·in) for the rows of ``unfolded``."""
    return weight.to(dtype).permute(0, 2, 3, 1).reshape(len(weight), -1)


def _mirrored(matrix: Tensor) -> Tensor:
    """Returns the matrix (in, 9·out) of the mirrored weight, given the weight's (out, 9·in)."""
    taps = matrix.view(len(matrix), 9, -1).transpose(0, 1)  # (9, out, in)
    return taps.flip(0).flatten(0, 1).T


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
