"""The biologically plausible forms of the local losses (section 3.3).

Nothing is back-propagated through a local head, and a layer sees no labels but a fixed random
projection of them. P of a layer serves both of its losses.
"""

from dataclasses import dataclass
from math import sqrt

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from greedy.base.precision import widened
from greedy.losses.local import Features, LocalHeads
from greedy.losses.prediction import PredictionHead, pooling_of
from greedy.losses.similarity import feature_deviation, similarity_loss
from greedy.models import Shape


def projected_prediction_loss(p: Tensor, t: Tensor) -> Tensor:
    """L_pred-bio = BinaryCrossEntropy(t > 0, p), the mean over batch and outputs.

    ``p`` (B, D) are logits, ``t`` (B, D) the projected labels.
    """
    return F.binary_cross_entropy_with_logits(p, (t > 0).to(p.dtype))


class FeedbackHead(PredictionHead):
    """A prediction head trained by feedback alignment: its weight's and bias's gradients are the
    ordinary ones, the gradient of its input takes a fixed random matrix in the weight's place.

    Takes h (B, *shape), gives logits p (B, outputs) in float32. Weight and bias start at zero, the
    matrix is uniform in ±1/sqrt(inputs).
    """

    feedback: Tensor  # (outputs, inputs)

    def __init__(self, shape: Shape, outputs: int, pool_target: int) -> None:
        super().__init__(shape, outputs, pool_target)
        nn.init.zeros_(self.classifier.bias)
        bound = 1 / sqrt(self.classifier.in_features)
        matrix = torch.empty(outputs, self.classifier.in_features).uniform_(-bound, bound)
        self.register_buffer("feedback", matrix)

    def forward(self, h: Tensor) -> Tensor:
        *before, classifier = self
        for module in before:
            h = module(h)
        back = F.linear(h, self.feedback)  # what it adds is zero but for its gradient
        return widened(classifier(h.detach()) + (back - back.detach()))


class PooledDeviation(nn.Module):
    """What takes the similarity head's place: the prediction head's average pooling, then the
    standard deviation over each feature map, or over the tokens. Vectors stay as they are.

    Takes h (B, *shape), gives z (B, F).
    """

    def __init__(self, shape: Shape, pool_target: int) -> None:
        super().__init__()
        self.pool = pooling_of(shape, pool_target) or nn.Identity()

    def forward(self, h: Tensor) -> Tensor:
        return feature_deviation(self.pool(h))


class ProjectedHeads(LocalHeads):
    """Local heads whose loss aims at P·Y instead of the labels Y. P (width, classes) is drawn as a
    linear layer's weight is and never trained.

    The prediction head predicts the signs of P·y, and its outputs are independent: the
    log-likelihood of a class is the sum of p over the positive entries of the class's column of P,
    plus what is the same for all classes. These sums are the local classifier's logits.
    """

    projection: Tensor

    def __init__(
        self,
        num_classes: int,
        width: int,
        *,
        similarity: nn.Module | None = None,
        prediction: nn.Module | None = None,
    ) -> None:
        super().__init__(similarity, prediction)
        drawn = nn.Linear(num_classes, width, bias=False).weight.detach()
        self.register_buffer("projection", drawn)

    def targets(self, y: Tensor) -> Tensor:
        """P·y (B, width) of one-hot labels (B, classes)."""
        return F.linear(y, self.projection)

    def logits(self, features: Features) -> Tensor | None:
        """The local classifier's logits (B, classes); ``None`` without one."""
        p = super().logits(features)
        return None if p is None else p @ self._positive().to(p.dtype)

    def modules_for_inference(self) -> list[nn.Module]:
        """Modules as other heads have them; the last of them sums up p."""
        before = super().modules_for_inference()
        if not before:
            return []
        width, num_classes = self.projection.shape
        sums = nn.Linear(width, num_classes, bias=False)
        sums.weight = nn.Parameter(self._positive().T.to(sums.weight.dtype).contiguous())
        return [*before, sums]

    def _positive(self) -> Tensor:
        return self.projection > 0


@dataclass(frozen=True)
class PredBio:
    """The prediction loss by feedback alignment, on binarised projected labels. ``pool_target`` is
    that of ``Pred``, ``target_projection`` the width of P."""

    pool_target: int = 2048
    target_projection: int = 128
    output_scale: float = 1.0

    def heads(self, shape: Shape, num_classes: int) -> LocalHeads:
        return ProjectedHeads(
            num_classes,
            self.target_projection,
            prediction=FeedbackHead(shape, self.target_projection, self.pool_target),
        )

    def __call__(self, features: Features, y: Tensor) -> Tensor:
        return projected_prediction_loss(features.p, y)


@dataclass(frozen=True)
class SimBio:
    """The similarity matching loss without a head to train, on projected labels. It trains no
    local classifier."""

    pool_target: int = 2048
    target_projection: int = 128
    output_scale: float = 1.0

    def heads(self, shape: Shape, num_classes: int) -> LocalHeads:
        return ProjectedHeads(
            num_classes,
            self.target_projection,
            similarity=PooledDeviation(shape, self.pool_target),
        )

    def __call__(self, features: Features, y: Tensor) -> Tensor:
        return similarity_loss(features.z, y)


@dataclass(frozen=True)
class PredSimBio:
    """Both losses combined, equation (8). Here too the published code scales the output layer's
    cross-entropy by 1 - beta."""

    beta: float = 0.01
    pool_target: int = 2048
    target_projection: int = 128

    @property
    def output_scale(self) -> float:
        return 1 - self.beta

    def heads(self, shape: Shape, num_classes: int) -> LocalHeads:
        return ProjectedHeads(
            num_classes,
            self.target_projection,
            similarity=PooledDeviation(shape, self.pool_target),
            prediction=FeedbackHead(shape, self.target_projection, self.pool_target),
        )

    def __call__(self, features: Features, y: Tensor) -> Tensor:
        l_pred = projected_prediction_loss(features.p, y)
        l_sim = similarity_loss(features.z, y)
        return (1 - self.beta) * l_pred + self.beta * l_sim
