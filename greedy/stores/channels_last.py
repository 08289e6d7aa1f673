"""The layout of feature maps in frozen stages on a CPU."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor, nn

from greedy.base.torch_private import CONVOLUTIONS, has_hooks
from greedy.models import Stage

Frozen = Callable[[Tensor], Tensor]
# Packages whose modules take maps in any layout, and what their classes are derived from.
KNOWN = {"greedy", "torch", "torchvision", "builtins", "typing", "abc", "collections"}
CODE = (torch.fx.GraphModule, torch.jit.ScriptModule)  # torch's classes for the code of others


def takes_channels_last(stage: Stage, device_type: str) -> bool:
    """Returns whether a frozen stage with convolutions computes channels-last maps on a device of
    this type: on a CPU, since torch's max-pooling is ten times as fast there and oneDNN copies no
    maps. Modules of others may look at the layout, as ``x.view(len(x), -1)`` does. On CUDA all maps
    are channels-last."""
    modules = list(stage.modules())
    return (
        device_type == "cpu"
        and any(isinstance(module, CONVOLUTIONS) for module in modules)
        and all(map(_takes_any_layout, modules))
    )


def _takes_any_layout(module: nn.Module) -> bool:
    packages = {kind.__module__.split(".")[0] for kind in type(module).__mro__}
    return packages <= KNOWN and not isinstance(module, CODE) and not has_hooks(module)


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
