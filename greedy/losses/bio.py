"""The biologically plausible forms of the local losses (section 3.3).

    L_pred-bio    = BinaryCrossEntropy(P·Y > 0, W^T·H), by feedback alignment
    L_sim-bio     = ||S(StandardDeviation(AvgPool(H))) − S(P·Y)||²
    L_predsim-bio = (1 − β) L_pred-bio + β L_sim-bio                                          (8)

Nothing is back-propagated through a local head, and a layer sees no labels Y but a fixed random
projection P·Y of them. A layer's two losses share one P.
"""

from dataclasses import dataclass
from math import sqrt

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from greedy.base.precision import widened
from greedy.losses.layers import head_pooling
from greedy.losses.local import Features, LocalHeads
from greedy.losses.prediction import PredictionHead
from greedy.losses.similarity import feature_deviation, similarity_loss
from greedy.models import Shape


def projected_prediction_loss(p: Tensor, t: Tensor) -> Tensor:
    """Returns L_pred-bio = BinaryCrossEntropy(t > 0, p), the mean over batch and outputs.

    ``p`` (B, D) are logits, ``t`` (B, D) the projected labels P·y.
    """
    return F.binary_cross_entropy_with_logits(p, (t > 0).to(p.dtype))


class FeedbackHead(PredictionHead):
    """A prediction head p = W^T·h trained by feedback alignment: the gradients of W and its bias
    are the ordinary ones, the gradient of h uses a fixed random matrix in place of W.

    Takes h (B, *shape), gives logits p (B, outputs) in float32. W and its bias start at zero, the
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
        back = F.linear(h, self.feedback)  # minus itself: zero, with this gradient by h
        return widened(classifier(h.detach()) + (back - back.detach()))


class PooledDeviation(nn.Module):
    """The replacement of the similarity head: the prediction head's average pooling, then the
    standard deviation over each feature map, or over the tokens. Vectors stay unchanged.

    Takes h (B, *shape), gives z (B, F). It has no weights.
    """

    def __init__(self, shape: Shape, pool_target: int) -> None:
        super().__init__()
        self.pool = head_pooling(shape, pool_target) or nn.Identity()

    def forward(self, h: Tensor) -> Tensor:
        return feature_deviation(self.pool(h))


class ProjectedHeads(LocalHeads):
    """Local heads whose loss takes P·y in place of the one-hot labels y. P (width, classes) is
    drawn like a linear layer's weight and never trained.

    The prediction head predicts the signs of P·y by independent outputs. The log-likelihood of a
    class is therefore the sum of p over the positive entries of the class's column of P, plus a
    constant that all classes share. These sums are the local classifier's logits.
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
        """Returns P·y (B, width) for one-hot labels (B, classes)."""
        return F.linear(y, self.projection)

    def logits(self, features: Features) -> Tensor | None:
        """Returns the local classifier's logits (B, classes); ``None`` without one."""
        p = super().logits(features)
        return None if p is None else p @ self._positive().to(p.dtype)

    def modules_for_inference(self) -> list[nn.Module]:
        """Returns the prediction head's modules, then a linear layer that sums p for each class."""
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
    """L_pred-bio: the prediction loss by feedback alignment, on binarised projected labels.

    Attributes:
        pool_target: the largest width of the local classifier's input after average pooling.
        target_projection: the width of P.
        output_scale: the factor on the output layer's cross-entropy.
    """

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
    """L_sim-bio: the similarity matching loss without a trained head, on projected labels. It
    trains no local classifier. Its attributes are those of ``PredBio``."""

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
    """L_predsim-bio = (1 − β) L_pred-bio + β L_sim-bio, equation (8). As in the published code, the
    output layer's cross-entropy has the factor 1 − β."""

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
