"""The layout of feature maps in frozen stages on a CPU."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from greedy.base.torch_private import CONVOLUTIONS
from greedy.models import Stage
from greedy.models.memory_format import takes_any_layout

Frozen = Callable[[Tensor], Tensor]


def takes_channels_last(stage: Stage, device_type: str) -> bool:
    """Returns whether a frozen stage with convolutions computes channels-last maps on a device of
    this type: on a CPU, since torch's max-pooling is ten times as fast there and oneDNN copies no
    maps. On CUDA every stage that takes them gets them."""
    convolves = any(isinstance(module, CONVOLUTIONS) for module in stage.modules())
    return device_type == "cpu" and convolves and takes_any_layout(stage)


@dataclass(frozen=True)
class ChannelsLast:
    """Frozen stages that compute channels-last maps one after the other."""

    stages: Sequence[Frozen]

    def __call__(self, x: Tensor) -> Tensor:
        """Returns the last stage's output, laid out as ever, for inputs (B, *shape)."""
        if x.dim() == 4:
            x = x.contiguous(memory_format=torch.channels_last)
        for stage in self.stages:
            x = stage(x)
        return x.contiguous()


def laid_out(stages: Sequence[Frozen], channels_last: Sequence[bool]) -> list[Frozen]:
    """Returns frozen stages of which some compute channels-last maps, as ``channels_last`` says of
    each."""
    pairs = groupby(zip(channels_last, stages, strict=True), key=lambda pair: pair[0])
    together = ((last, [stage for _, stage in several]) for last, several in pairs)
    return [
        stage
        for last, several in together
        for stage in ([ChannelsLast(several)] if last else several)
    ]
