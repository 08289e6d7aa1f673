"""The prediction loss, equation (6)."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from greedy.base.precision import widened
from greedy.losses.auxiliary import later_layer
from greedy.losses.layers import pooled, same_width
from greedy.models import Shape
from greedy.models.lean import Layer, lean


@dataclass(frozen=True)
class CrossEntropy:
    """The cross-entropy of logits, with the numbers of ``nn.CrossEntropyLoss``.

    Attributes:
        label_smoothing: the share of each target that is spread evenly over all classes.
        class_weights: the weight of each class; ``None`` for equal weights. The mean over a batch
            is divided by the weights of its rows.
    """

    label_smoothing: float = 0.0
    class_weights: tuple[float, ...] | None = None
    _weights: dict[tuple[torch.device, torch.dtype], Tensor] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __call__(self, p: Tensor, y: Tensor) -> Tensor:
        """Returns the mean over a batch of logits ``p`` and labels ``y``, one-hot or mixed, both
        (B, classes)."""
        if self.class_weights is None:
            return F.cross_entropy(p, y, label_smoothing=self.label_smoothing)
        weights = self._weights_like(p, self.class_weights)
        smoothing = self.label_smoothing
        loss = F.cross_entropy(p, y, weights, reduction="sum", label_smoothing=smoothing)
        return loss / (y @ weights).sum()

    def _weights_like(self, p: Tensor, weights: tuple[float, ...]) -> Tensor:
        if type(p) is not Tensor:  # a fake one, which no real step may find here
            return p.new_tensor(weights)
        key = p.device, p.dtype
        if key not in self._weights:  # copied once, since copying synchronises
            self._weights[key] = p.new_tensor(weights)
        return self._weights[key]


PLAIN = CrossEntropy()


def prediction_loss(p: Tensor, y: Tensor, cross_entropy: CrossEntropy = PLAIN) -> Tensor:
    """Returns L_pred = CrossEntropy(Y, p) with p = W^T·H, the mean over the batch, equation (6).

    ``p`` (B, classes) are logits, ``y`` (B, classes) the one-hot labels.
    """
    return cross_entropy(p, y)


class PredictionHead(nn.Sequential):
    """The local classifier W of equation (6), p = W^T·h, with average pooling before it for feature
    maps and tokens.

    Takes h (B, *shape), gives logits p (B, classes) in float32. W starts at zero.

    ``hidden_layers`` as wide as h, 3x3 convolutions or linear layers followed by ReLU, may come
    first, after Belilovsky et al., "Greedy layerwise learning can scale to ImageNet" (2019). Here
    they have no batch norm: a row's logits depend on that row alone.

    Then comes a layer for each of the ``later`` stages, given by the shapes of their activations,
    see ``greedy.losses.auxiliary``.
    """

    def __init__(
        self,
        shape: Shape,
        num_classes: int,
        pool_target: int,
        hidden_layers: int = 0,
        later: Sequence[Shape] = (),
    ) -> None:
        super().__init__()
        for number in range(1, hidden_layers + 1):
            self.add_module(f"hidden{number}", same_width(shape))
            self.add_module(f"activation{number}", nn.ReLU(inplace=True))
        for number, target in enumerate(later, start=1):
            layer, shape = later_layer(shape, target, pool_target)
            self.add_module(f"later{number}", layer)
        pooling, width = pooled(shape, pool_target)
        for name, module in zip(("pool", "flatten"), pooling, strict=False):
            self.add_module(name, module)
        self.classifier = nn.Linear(width, num_classes)
        nn.init.zeros_(self.classifier.weight)

    def forward(self, h: Tensor) -> Tensor:
        for module in self:
            is_hidden = isinstance(module, Layer) and module.bias is None
            h = lean(module, h) if is_hidden else module(h)
        return widened(h)
