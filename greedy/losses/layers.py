"""The layers and the pooling that local heads consist of."""

import math

import torch
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


def pooling_kernel(shape: Shape, target: int) -> tuple[int, int]:
    """Returns the kernel (height, width) of the average pooling that reduces a (C, H, W) map to at
    most ``target`` values: height and width are doubled in turn while the map is too large. It ends
    at one row, where a map much wider than high may have more values."""
    channels, height, width = shape
    kernel = [1, 1]

    def pooled_size() -> int:
        return channels * math.ceil(height / kernel[0]) * math.ceil(width / kernel[1])

    while pooled_size() > target and kernel[0] < height:
        kernel[0] *= 2
        if pooled_size() > target:
            kernel[1] *= 2
    return kernel[0], kernel[1]


def average_pooling(shape: Shape, target: int) -> nn.AvgPool2d:
    """Returns the prediction head's pooling of maps; padded zeros count in the mean, as
    published."""
    kernel = pooling_kernel(shape, target)
    padding = [
        k * (math.ceil(side / k) - side // k) // 2
        for k, side in zip(kernel, shape[1:], strict=True)
    ]
    return nn.AvgPool2d(kernel, padding=(padding[0], padding[1]))


def token_pooling(shape: Shape, target: int) -> nn.AvgPool2d:
    """Returns the pooling of tokens (T, D): it averages neighbours, twice as many at a time while
    more than ``target`` values are left. Tokens pass as one image whose channels are the
    samples."""
    tokens, width = shape
    kernel = 1
    while math.ceil(tokens / kernel) * width > target and kernel < tokens:
        kernel *= 2
    return nn.AvgPool2d((min(kernel, tokens), 1), ceil_mode=True)


def head_pooling(shape: Shape, target: int) -> nn.AvgPool2d | None:
    """Returns the pooling that reduces h to about ``target`` values; ``None`` for vectors."""
    if len(shape) == 1:
        return None
    return token_pooling(shape, target) if len(shape) == 2 else average_pooling(shape, target)


def pooled(shape: Shape, target: int) -> tuple[list[nn.Module], int]:
    """Returns the modules that pool h to about ``target`` values and flatten it, none for vectors,
    and the number of values that they give."""
    pool = head_pooling(shape, target)
    if pool is None:
        return [], shape[0]
    return [pool, nn.Flatten()], pool(torch.empty(1, *shape, device="meta")).numel()
