"""In which precision numbers are computed."""

import torch
from torch import Tensor

HALVES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def autocast(device_type: str, precision: str) -> torch.autocast:
    """Convolutions and linear layers in a precision called by its name; weights stay float32."""
    dtype = HALVES.get(precision, torch.bfloat16)
    return torch.autocast(device_type, dtype, enabled=precision in HALVES)


def widened(x: Tensor) -> Tensor:
    """Half-precision numbers in float32, others as they are: for sums and losses."""
    return x.float() if x.dtype.itemsize < torch.float32.itemsize else x
