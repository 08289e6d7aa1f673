"""The local losses: which heads a stage gets, and what they are trained to do."""

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn

from greedy.base.errors import UserError
from greedy.base.precision import widened
from greedy.losses.prediction import PredictionHead, prediction_loss
from greedy.losses.similarity import SimilarityHead, similarity_loss
from greedy.models import Shape


class Features(NamedTuple):
    """What the heads make of an activation h, a row a sample: all that a loss may couple.
    ``None`` stands where a head is absent.

    Attributes:
        z: similarity features (B, F).
        p: logits (B, classes), or of what else the prediction head predicts.
    """

    z: Tensor
    p: Tensor


class LocalHeads(nn.Module):
    """The sub-networks that exist only while a stage trains. Takes h, gives ``Features``."""

    def __init__(self, similarity: nn.Module | None = None, prediction: nn.Module | None = None):
        super().__init__()
        self.similarity = similarity
        self.prediction = prediction

    def forward(self, h: Tensor) -> Features:
        return Features(z=_of(self.similarity, h), p=_of(self.prediction, h))

    def targets(self, y: Tensor) -> Tensor:
        """What the loss aims at for one-hot labels ``y`` (B, classes): here the labels."""
        return y

    def logits(self, features: Features) -> Tensor | None:
        """The local classifier's logits (B, classes) without gradient; ``None`` without one."""
        return None if features.p is None else features.p.detach()

    def modules_for_inference(self) -> list[nn.Module]:
        """The local classifier, from h to logits, in order; empty without one. Of plain torch
        modules if the prediction head is ours."""
        if self.prediction is None:
            return []
        is_ours = isinstance(self.prediction, PredictionHead)
        return list(self.prediction.children()) if is_ours else [self.prediction]


def _of(head: nn.Module | None, h: Tensor) -> Any:
    return None if head is None else head(h)


class LocalLoss(Protocol):
    """What the training step asks of a local loss. Bring your own by writing these three."""

    @property
    def output_scale(self) -> float:
        """The factor on the output layer's cross-entropy."""

    def heads(self, shape: Shape, num_classes: int) -> LocalHeads:
        """New heads for a stage whose activation h has this shape a row."""

    def __call__(self, features: Features, y: Tensor) -> Tensor:
        """The loss, a scalar, of a batch with one-hot labels ``y`` (B, classes), or what the
        heads' ``targets`` makes of them."""


def require_local_loss(loss: Any) -> None:
    """Raises ``UserError`` for what is no local loss."""
    if isinstance(loss, type) or not (callable(loss) and hasattr(loss, "heads")):
        named = loss.__name__ if isinstance(loss, type) else repr(loss)
        raise UserError(
            f"{named} is no local loss, which makes its own heads: give one of greedy.losses, such "
            f"as greedy.losses.PredSim(), or write one with heads, output_scale and __call__"
        )


def heads_of(loss: LocalLoss, shape: Shape, num_classes: int) -> LocalHeads:
    """A loss's new heads for a stage whose activation h has this shape a row. Raises ``UserError``
    where it gives something else."""
    heads = loss.heads(shape, num_classes)
    if not isinstance(heads, LocalHeads):
        raise UserError(
            f"the heads of {type(loss).__name__} are of type {type(heads).__name__}: let its heads "
            f"method return greedy.losses.LocalHeads(similarity, prediction)"
        )
    return heads


@dataclass(frozen=True)
class Pred:
    """The prediction loss, equation (6). ``pool_target``: the largest width of the local
    classifier's input after average pooling; ``hidden_layers``: of the prediction head, before
    that pooling."""

    pool_target: int = 2048
    hidden_layers: int = 0
    output_scale: float = 1.0

    def heads(self, shape: Shape, num_classes: int) -> LocalHeads:
        head = PredictionHead(shape, num_classes, self.pool_target, self.hidden_layers)
        return LocalHeads(prediction=head)

    def __call__(self, features: Features, y: Tensor) -> Tensor:
        return prediction_loss(features.p, y)


@dataclass(frozen=True)
class Sim:
    """The similarity matching loss, equation (4). It trains no local classifier."""

    output_scale: float = 1.0

    def heads(self, shape: Shape, num_classes: int) -> LocalHeads:
        return LocalHeads(similarity=SimilarityHead(shape))

    def __call__(self, features: Features, y: Tensor) -> Tensor:
        return similarity_loss(features.z, y)


@dataclass(frozen=True)
class PredSim:
    """Both losses combined, equation (7). The published code scales the output layer's
    cross-entropy by 1 - beta too."""

    beta: float = 0.99
    pool_target: int = 2048
    hidden_layers: int = 0

    @property
    def output_scale(self) -> float:
        return 1 - self.beta

    def heads(self, shape: Shape, num_classes: int) -> LocalHeads:
        return LocalHeads(
            similarity=SimilarityHead(shape),
            prediction=PredictionHead(shape, num_classes, self.pool_target, self.hidden_layers),
        )

    def __call__(self, features: Features, y: Tensor) -> Tensor:
        l_pred = prediction_loss(features.p, y)
        l_sim = similarity_loss(features.z, y)
        return (1 - self.beta) * l_pred + self.beta * l_sim


@dataclass(frozen=True)
class Glob:
    """No local loss: the network is trained from its end alone."""

    output_scale: float = 1.0

    def heads(self, shape: Shape, num_classes: int) -> LocalHeads:
        return LocalHeads()

    def __call__(self, features: Features, y: Tensor) -> Tensor:
        return y.new_zeros(())


@dataclass(frozen=True)
class Output:
    """The output layer's loss: its activation is the prediction. A local loss like the others,
    so that the last stage trains as the others do."""

    scale: float = 1.0

    @property
    def output_scale(self) -> float:
        return self.scale

    def heads(self, shape: Shape, num_classes: int) -> LocalHeads:
        return LocalHeads(prediction=Float())

    def __call__(self, features: Features, y: Tensor) -> Tensor:
        return self.scale * prediction_loss(features.p, y)


class Float(nn.Module):
    """h itself, at least in float32 whatever the precision."""

    def forward(self, h: Tensor) -> Tensor:
        return widened(h)
