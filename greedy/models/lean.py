"""Convolutions and linear layers that need no second tensor of their weight's size.

Autograd makes a new weight gradient at every use of a layer and adds it to the old one, and
autocast keeps a copy of the weight in lower precision. Here gradients are accumulated in place, and
both are computed for a slice of output channels at a time.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_weight

from greedy.base.torch_private import function_modes

Layer = nn.Conv2d | nn.Linear

SLICE_BYTES = 8 * 2**20  # of a weight's gradient that are computed at a time


def output_slices(weight: Tensor) -> list[slice]:
    """Returns slices of a weight's output channels, of at most ``SLICE_BYTES`` or one channel."""
    step = max(1, SLICE_BYTES // (weight[0].numel() * weight.element_size()))
    return [slice(start, start + step) for start in range(0, len(weight), step)]


def lean(layer: nn.Module, x: Tensor) -> Tensor:
    """Returns ``layer(x)`` of a convolution or linear layer without bias. Where the weight already
    has a gradient, as in a micro-batched step, the backward pass adds to it in place."""
    assert isinstance(layer, Layer) and layer.bias is None
    if not torch.is_grad_enabled():
        return forward(layer, x)
    if layer.weight.grad is None:
        return layer(x)
    out: Tensor = _Lean.apply(x, layer.weight, layer)
    return out


def forward(layer: Layer, x: Tensor) -> Tensor:
    """Returns ``layer(x)`` without gradient, in autocast's precision where that is on."""
    if not torch.is_autocast_enabled(x.device.type):
        return _apply(layer, x, layer.weight, layer.bias)
    dtype = torch.get_autocast_dtype(x.device.type)
    x = x.to(dtype)
    parts = [
        _apply(layer, x, layer.weight[rows].to(dtype), _cast(layer.bias, rows, dtype))
        for rows in output_slices(layer.weight)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=_channels(layer))


def add_weight_gradient(layer: Layer, x: Tensor, g: Tensor, total: Tensor) -> None:
    """Adds the gradient of a layer's weight to ``total``, given the layer's input ``x``
    (B, Cin, ...) and the gradient ``g`` (B, Cout, ...) of its output; for a linear layer (..., in)
    and (..., out). Where all output channels have equal gradients, ``g`` and ``total`` may hold
    one."""
    if isinstance(layer, nn.Linear):
        x, g = x.flatten(0, -2), g.flatten(0, -2)
    for rows in output_slices(total):
        part = total[rows]
        if isinstance(layer, nn.Linear):
            part += g[:, rows].T @ x
        else:
            part += conv2d_weight(x, part.shape, g[:, rows], **_geometry(layer))


def input_gradient(layer: Layer, x: Tensor, g: Tensor) -> Tensor:
    """Returns the gradient of a layer's input ``x`` from that of its output ``g``; it is computed
    in g's precision."""
    if g.dtype == layer.weight.dtype:
        return _input_gradient(layer, x.to(g.dtype), g, layer.weight)
    total, dtype = torch.zeros_like(x, dtype=layer.weight.dtype), x.dtype
    x = x.to(g.dtype)
    for rows in output_slices(layer.weight):
        weight = layer.weight[rows].to(g.dtype)
        part = g.narrow(_channels(layer), rows.start, len(weight))
        total += _input_gradient(layer, x, part, weight)
    return total.to(dtype)


class _Lean(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, layer: Layer) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(x)
        ctx.layer, ctx.modes = layer, function_modes()
        return forward(layer, x)

    @staticmethod
    def backward(ctx, g: Tensor):  # type: ignore[no-untyped-def]
        (x,) = ctx.saved_tensors
        with ctx.modes():
            add_weight_gradient(ctx.layer, x.to(g.dtype), g, ctx.layer.weight.grad)
            needed = ctx.needs_input_grad[0]
            return input_gradient(ctx.layer, x, g) if needed else None, None, None


def _channels(layer: Layer) -> int:
    """Returns the dimension of a layer's output that holds its output channels."""
    return -1 if isinstance(layer, nn.Linear) else 1


def _apply(layer: Layer, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if isinstance(layer, nn.Linear):
        return F.linear(x, weight, bias)
    return F.conv2d(x, weight, bias, **_geometry(layer))


def _input_gradient(layer: Layer, x: Tensor, g: Tensor, weight: Tensor) -> Tensor:
    if isinstance(layer, nn.Linear):
        return g @ weight
    # torch's `conv2d_input` would allocate another tensor as large as x.
    gradient: Tensor
    gradient, _, _ = torch.ops.aten.convolution_backward(
        g,
        x,
        weight,
        None,
        *_geometry(layer).values(),
        transposed=False,
        output_padding=[0, 0],
        groups=1,
        output_mask=[True, False, False],
    )
    return gradient


def _geometry(layer: nn.Conv2d) -> dict[str, Any]:
    assert isinstance(layer.padding, tuple)
    return {"stride": layer.stride, "padding": layer.padding, "dilation": layer.dilation}


def _cast(bias: Tensor | None, rows: slice, dtype: torch.dtype) -> Tensor | None:
    return None if bias is None else bias[rows].to(dtype)
