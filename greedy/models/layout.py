"""Feature maps whose features come last, as some models have them inside."""

from collections.abc import Sequence
from contextlib import suppress

import torch
from torch import Tensor, nn

from greedy.models.chain import Part
from greedy.models.skeleton import skeleton
from greedy.models.stages import ENCODERS, Shape


class Axes(nn.Module):
    """Puts the axes of its input into another order.

    Args:
        order: the axes, the first of which stays.
    """

    def __init__(self, *order: int) -> None:
        super().__init__()
        self.order = order

    def forward(self, x: Tensor) -> Tensor:
        return x.permute(self.order)

    def extra_repr(self) -> str:
        return ", ".join(map(str, self.order))


def features_first(found: Sequence[Part], image: Shape) -> list[Part]:
    """Returns parts that compute the same one after the other, and of which none gives maps
    (H, W, C): each such part gives (C, H, W), and the one after it turns them back."""
    turned: list[Part] = []
    before = False
    for part, last in zip(found, _features_last(found, image), strict=True):
        inner = [*part.module] if type(part.module) is nn.Sequential else [part.module]
        modules = [
            *([Axes(0, 2, 3, 1)] if before else []),
            *inner,
            *([Axes(0, 3, 1, 2)] if last else []),
        ]
        turned.append(Part(nn.Sequential(*modules), part.path) if before or last else part)
        before = last
    return turned


def _features_last(found: Sequence[Part], image: Shape) -> list[bool]:
    """Returns for each part whether it gives maps (H, W, C), where C are the features of the last
    layer until there. A width may be as large, so images of twice the width show that the last side
    is none; where a model does not take them, H must not be as large too."""
    channels, height, width = image
    outputs = _outputs(found, image)
    if len(outputs) < len(found):
        return [False] * len(found)
    wide = _outputs(found, (channels, height, 2 * width))
    results = []
    features = 0
    for index, (part, output) in enumerate(zip(found, outputs, strict=True)):
        features = _features(part.module) or features
        last = len(output) == 3 and output[-1] == features
        if last:
            if index < len(wide):
                last = wide[index][-1] == features and wide[index][-2] != output[-2]
            else:
                last = output[0] != features
        results.append(last)
    return results


def _features(module: nn.Module) -> int | None:
    """Returns the features that the last layer in a module gives; ``None`` without one."""
    layers = [layer for layer in module.modules() if isinstance(layer, ENCODERS)]
    if not layers:
        return None
    last = layers[-1]
    return last.out_features if isinstance(last, nn.Linear) else last.out_channels


@torch.no_grad()
def _outputs(found: Sequence[Part], image: Shape) -> list[Shape]:
    """Returns the shapes of a row after each part, until one that does not take what it gets or
    does not work on the meta device."""
    x = torch.empty((2, *image), device="meta")
    outputs: list[Shape] = []
    with suppress(RuntimeError, AssertionError, AttributeError, ValueError, TypeError):
        for part in found:
            x = skeleton(part.module).eval()(x)
            outputs.append(tuple(x.shape[1:]))
    return outputs
