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
    dense = [x.coalesce().values() if x.is_sparse else x for x in tensors]
    nonempty = [x for x in dense if x.numel()]
    return torch.isfinite(nn.utils.get_total_norm(nonempty, float("inf")))
