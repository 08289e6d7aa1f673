"""The precision that numbers are computed in, and whether they are finite."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

HALVES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def autocast(device_type: str, precision: str) -> torch.autocast:
    """Returns the autocast context for a precision by name: convolutions and linear layers compute
    in it, weights stay float32."""
    dtype = HALVES.get(precision, torch.bfloat16)
    return torch.autocast(device_type, dtype, enabled=precision in HALVES)


def widened(x: Tensor) -> Tensor:
    """Returns half-precision numbers in float32, others unchanged: for sums and losses."""
    return x.float() if x.dtype.itemsize < torch.float32.itemsize else x


@torch.no_grad()
def all_finite(tensors: Iterable[Tensor]) -> Tensor:
    """Returns whether tensors hold neither infinities nor NaN, as a scalar on their device, without
    waiting for it."""
    numbers = [real for real in map(_real_numbers, tensors) if real.numel()]
    if any(real.device.type != "cpu" for real in numbers):
        return torch.isfinite(nn.utils.get_total_norm(numbers, float("inf")))  # in a few launches
    # On a CPU that norm takes 25 times as long as both extremes, which are NaN if a number is.
    extremes = [extreme for real in numbers for extreme in torch.aminmax(real)]
    return torch.isfinite(torch.stack(extremes)).all() if extremes else torch.tensor(True)


def _real_numbers(x: Tensor) -> Tensor:
    """Returns all numbers that a tensor stores, complex ones as pairs."""
    x = x.coalesce().values() if x.is_sparse else x
    return torch.view_as_real(x) if x.is_complex() else x
