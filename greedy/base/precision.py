"""In which precision numbers are computed, and whether they are numbers."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

HALVES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def autocast(device_type: str, precision: str) -> torch.autocast:
    """Convolutions and linear layers in a precision called by its name; weights stay float32."""
    dtype = HALVES.get(precision, torch.bfloat16)
    return torch.autocast(device_type, dtype, enabled=precision in HALVES)


def widened(x: Tensor) -> Tensor:
    """Half-precision numbers in float32, others as they are: for sums and losses."""
    return x.float() if x.dtype.itemsize < torch.float32.itemsize else x


@torch.no_grad()
def all_finite(tensors: Iterable[Tensor]) -> Tensor:
    """Whether tensors hold neither infinities nor NaN: a scalar on their device, not waited for."""
    dense = [each.coalesce().values() if each.is_sparse else each for each in tensors]
    some = [each for each in dense if each.numel()]
    return torch.isfinite(nn.utils.get_total_norm(some, float("inf")))
