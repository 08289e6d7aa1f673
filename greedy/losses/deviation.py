"""The standard deviation of every feature map, without a second copy of the maps.

torch's own takes a float32 copy of maps in lower precision, a centred copy in its backward pass,
and ten times as long on a CPU. Here a few rows are computed at a time, forward and backward.
"""

from typing import Any

import torch
from torch import Tensor

from greedy.base.precision import widened
from greedy.base.torch_private import FakeTensor

SLICE_BYTES = 8 * 2**20  # of maps in float32 that are computed at a time
ROUNDING = 2**-18  # relative to a map's mean: a constant map deviates by less, where compiled
CUDA_SLICE_BYTES = 2 * SLICE_BYTES  # larger, since every slice launches several kernels


def deviation(z: Tensor) -> Tensor:
    """Returns the unbiased standard deviation over space, at least in float32: (B, C, H, W) to
    (B, C). The gradient is 0 where the deviation is 0."""
    out: Tensor = _Deviation.apply(z)
    return out


class _Deviation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor) -> Tensor:
        std = widened(z.new_empty(z.shape[:2]))
        mean = torch.empty_like(std)[..., None, None]
        for rows in _slices(z):
            mean[rows], std[rows] = _mean_and_deviation(widened(z[rows]))
        ctx.save_for_backward(z, mean, std)
        return std

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> Tensor:
        z, mean, std = ctx.saved_tensors
        slope = torch.where(std > 0, slope / (std * (z[0, 0].numel() - 1)), 0)[..., None, None]
        out = torch.empty_like(z)
        for rows in _slices(z):
            out[rows] = (widened(z[rows]) - mean[rows]).mul_(slope[rows])
        return out


def _mean_and_deviation(z: Tensor) -> tuple[Tensor, Tensor]:
    """Returns mean and deviation of each map. On a CPU maps are first shifted by one of their
    values, so that nothing cancels and a constant map deviates by exactly 0. CUDA's own kernel
    achieves that too, but not once it is compiled together with the operators that give z."""
    if z.is_cuda:
        variance, mean = torch.var_mean(z, (2, 3), keepdim=True)
        std = torch.where(variance.sqrt() > ROUNDING * mean.abs(), variance.sqrt(), 0)
        return mean, std[..., 0, 0]
    shift = z[:, :, :1, :1]
    centred = z - shift
    mean = centred.mean((2, 3), keepdim=True)
    squares = centred.sub_(mean).square_().sum((2, 3))
    return mean + shift, (squares / (z[0, 0].numel() - 1)).sqrt_()


def _slices(z: Tensor) -> list[slice]:
    size = CUDA_SLICE_BYTES if z.is_cuda else SLICE_BYTES
    step = max(1, size // (z[0].numel() * max(z.element_size(), 4)))
    slices = [slice(start, start + step) for start in range(0, len(z), step)]
    return slices[:1] if isinstance(z, FakeTensor) else slices  # one shows the memory of each
