"""Layers of a prediction head that stand for the network's later layers.

After Ma et al., "Scaling Supervised Local Learning with Augmented Auxiliary Networks"
(arXiv 2402.17318): the head of a stage consists of layers like some of those that follow the stage,
chosen evenly ("uniform selection"), and later stages have fewer ("pyramidal depth"). With L stages
before the output layer and at most d layers, the head of stage l stands for d_l later stages:

    d_l = round(d - (d - 1) τ (l - 1) / (L - 2)), at most L - l,  τ = 1/2
    l + round(k (L - l) / d_l),  k = 1, …, d_l

The last of them is always stage L. As in the published code, a layer has all features of its stage,
and at most halves the sides of maps. There it is of the stage's own kind, such as a residual block;
here it is a single layer, whatever the stage consists of.
"""

from fractions import Fraction
from math import ceil, prod

from torch import nn

from greedy.losses.layers import pooled
from greedy.models import Shape


def later_stages(number: int, count: int, most: int) -> list[int]:
    """Returns the numbers of the stages that the head of stage ``number`` stands for, of ``count``
    before the output layer: at most ``most``, none for the last."""
    decayed = most - Fraction((most - 1) * (number - 1), 2 * max(1, count - 2))
    depth = min(round(decayed), count - number)
    return [number + round(Fraction(k * (count - number), depth)) for k in range(1, depth + 1)]


def later_layer(shape: Shape, target: Shape, pool_target: int) -> tuple[nn.Sequential, Shape]:
    """Returns a head's layer that stands for a later stage, and the shape of what it gives.

    It is a 3x3 convolution with batch norm for maps, with stride 2 unless that gives fewer
    positions than the stage has; a linear layer with batch norm for vectors; and a linear layer
    with layer norm for each token. ReLU follows. Where the stage gives vectors, maps and tokens are
    first pooled as before a classifier, to about ``pool_target`` values.

    Args:
        shape: the shape of a row of the layer's input.
        target: the shape of a row of the stage's activation.
    """
    features = target[-1] if len(target) == 2 else target[0]
    given: Shape
    if len(target) == 1 or len(shape) == 1:
        pooling, width = pooled(shape, pool_target)
        layers = [*pooling, nn.Linear(width, features, bias=False), nn.BatchNorm1d(features)]
        given = (features,)
    elif len(shape) == 2:
        layers = [nn.Linear(shape[1], features, bias=False), nn.LayerNorm(features)]
        given = (shape[0], features)
    else:
        channels, height, width = shape
        stride = _stride(height, width, target)
        convolution = nn.Conv2d(channels, features, 3, stride=stride, padding=1, bias=False)
        layers = [convolution, nn.BatchNorm2d(features)]
        given = (features, ceil(height / stride), ceil(width / stride))
    return nn.Sequential(*layers, nn.ReLU(inplace=True)), given


def _stride(height: int, width: int, target: Shape) -> int:
    positions = target[0] if len(target) == 2 else prod(target[1:])
    return 2 if positions <= ceil(height / 2) * ceil(width / 2) < height * width else 1
