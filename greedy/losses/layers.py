"""The layer that local heads consist of."""

from torch import nn

from greedy.models import Shape
from greedy.models.lean import Layer


def same_width(shape: Shape) -> Layer:
    """Returns a layer that keeps the shape of h: a 3x3 convolution for (C, H, W), a linear layer
    for (F,) and for each of the tokens (T, D). It has no bias, as ``greedy.models.lean.lean``
    requires."""
    if len(shape) < 3:
        return nn.Linear(shape[-1], shape[-1], bias=False)
    return nn.Conv2d(shape[0], shape[0], kernel_size=3, padding=1, bias=False)
