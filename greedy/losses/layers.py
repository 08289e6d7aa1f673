"""The layer that local heads are made of."""

from torch import nn

from greedy.lean import Layer
from greedy.models import Shape


def same_width(shape: Shape) -> Layer:
    """A layer that keeps the shape of h: a 3x3 convolution for (C, H, W), a linear layer for (F,).
    It has no bias, which is what ``greedy.lean.lean`` asks."""
    width = shape[0]
    if len(shape) == 1:
        return nn.Linear(width, width, bias=False)
    return nn.Conv2d(width, width, kernel_size=3, padding=1, bias=False)
