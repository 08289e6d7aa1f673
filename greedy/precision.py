"""In which precision numbers are computed."""

import torch
from torch import Tensor


def widened(x: Tensor) -> Tensor:
    """Half-precision numbers in float32, others as they are: for sums and losses."""
    return x.float() if x.dtype.itemsize < torch.float32.itemsize else x
