"""The local losses: the heads that each gives a stage, and the loss of their features.

    L_sim     = ||S(NeuralNet(H)) − S(Y)||²       (4)
    L_pred    = CrossEntropy(Y, W^T·H)            (6)
    L_predsim = (1 − β) L_pred + β L_sim          (7)

H are a batch's activations, Y its one-hot labels; the numbers are the paper's.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn

from greedy.base.errors import UserError
from greedy.base.precision import widened
from greedy.losses.prediction import PLAIN, CrossEntropy, PredictionHead, prediction_loss
from greedy.losses.similarity import SimilarityHead, similarity_loss
from greedy.models import Shape
from greedy.recipes.auxiliary import downstream_layers


class Features(NamedTuple):
    """The outputs of the heads for a batch of activations h; a loss may couple samples through them
    alone. ``None`` stands where a head is absent.

    Attributes:
        z: the similarity head's features NeuralNet(h) (B, F).
        p: the prediction head's logits W^T·h (B, classes), or its other predictions (B, D).
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
        return Features(z=_apply(self.similarity, h), p=_apply(self.prediction, h))

    def targets(self, y: Tensor) -> Tensor:
        """Returns the loss's targets for one-hot labels ``y`` (B, classes): here ``y``."""
        return y

    def logits(self, features: Features) -> Tensor | None:
        """Returns the local classifier's logits (B, classes) without gradient; ``None`` without
        one."""
        return None if features.p is None else features.p.detach()

    def modules_for_inference(self) -> list[nn.Module]:
        """Returns the local classifier's modules in order, from h to logits; empty without one. The
        prediction heads of this package give plain torch modules."""
        if self.prediction is None:
            return []
        is_ours = isinstance(self.prediction, PredictionHead)
        return list(self.prediction.children()) if is_ours else [self.prediction]


def _apply(head: nn.Module | None, h: Tensor) -> Any:
    return None if head is None else head(h)


class LocalLoss(Protocol):
    """The interface of a local loss. A class of your own needs these three."""

    @property
    def output_scale(self) -> float:
        """The factor on the output layer's cross-entropy."""

    def heads(self, shape: Shape, num_classes: int) -> LocalHeads:
        """Returns new heads for a stage whose activation h has this shape a row."""

    def __call__(self, features: Features, y: Tensor) -> Tensor:
        """Returns the loss, a scalar, of a batch with targets ``y``: the one-hot labels (B,
        classes), or the result of the heads' ``targets`` for them."""


def require_local_loss(loss: Any) -> None:
    """Raises ``UserError`` for an object that is no local loss."""
    has_all = callable(loss) and hasattr(loss, "heads") and hasattr(loss, "output_scale")
    if isinstance(loss, type) or not has_all:
        named = loss.__name__ if isinstance(loss, type) else repr(loss)
        raise UserError(
            f"{named} is no local loss: give one of greedy.losses, such as "
            f"greedy.losses.PredSim(), or write one with heads, output_scale and __call__"
        )
    if isinstance(loss, nn.Module) and any(p.requires_grad for p in loss.parameters()):
        raise UserError(
            f"the loss {type(loss).__name__} has parameters of its own, which nothing would train: "
            f"put them into the heads that it makes"
        )


def make_heads(loss: LocalLoss, shape: Shape, num_classes: int) -> LocalHeads:
    """Returns a loss's new heads for a stage whose activation h has this shape a row. Raises
    ``UserError`` where they are no ``LocalHeads``."""
    heads = loss.heads(shape, num_classes)
    if not isinstance(heads, LocalHeads):
        raise UserError(
            f"the heads of {type(loss).__name__} are of type {type(heads).__name__}: let its heads "
            f"method return greedy.losses.LocalHeads(similarity, prediction)"
        )
    return heads


@dataclass(frozen=True)
class Pred:
    """L_pred = CrossEntropy(Y, W^T·H): the prediction loss, equation (6).

    Attributes:
        pool_target: the largest width of the local classifier's input after average pooling.
        hidden_layers: of the prediction head, before that pooling.
        output_scale: the factor on the output layer's cross-entropy.
        cross_entropy: the loss of the logits, as a recipe's settings have it.
        auxiliary: ``none``, or ``downstream:d`` for up to d layers of the prediction head that
            stand for the network's later stages, see ``greedy.losses.auxiliary``.
        later: the shapes of a row of these stages' activations, which training sets for each stage.
    """

    pool_target: int = 2048
    hidden_layers: int = 0
    output_scale: float = 1.0
    cross_entropy: CrossEntropy = PLAIN
    auxiliary: str = "none"
    later: tuple[Shape, ...] = ()

    def __post_init__(self) -> None:
        _require_auxiliary(self.auxiliary)

    def heads(self, shape: Shape, num_classes: int) -> LocalHeads:
        return LocalHeads(prediction=_prediction_head(self, shape, num_classes))

    def __call__(self, features: Features, y: Tensor) -> Tensor:
        return prediction_loss(features.p, y, self.cross_entropy)


@dataclass(frozen=True)
class Sim:
    """L_sim = ||S(NeuralNet(H)) − S(Y)||²: the similarity matching loss, equation (4). It trains no
    local classifier."""

    output_scale: float = 1.0

    def heads(self, shape: Shape, num_classes: int) -> LocalHeads:
        return LocalHeads(similarity=SimilarityHead(shape))

    def __call__(self, features: Features, y: Tensor) -> Tensor:
        return similarity_loss(features.z, y)


@dataclass(frozen=True)
class PredSim:
    """L_predsim = (1 − β) L_pred + β L_sim, equation (7). As in the published code, the output
    layer's cross-entropy has the factor 1 − β too. The other attributes are those of ``Pred``."""

    beta: float = 0.99
    pool_target: int = 2048
    hidden_layers: int = 0
    cross_entropy: CrossEntropy = PLAIN
    auxiliary: str = "none"
    later: tuple[Shape, ...] = ()

    def __post_init__(self) -> None:
        _require_auxiliary(self.auxiliary)

    @property
    def output_scale(self) -> float:
        return 1 - self.beta

    def heads(self, shape: Shape, num_classes: int) -> LocalHeads:
        return LocalHeads(
            similarity=SimilarityHead(shape),
            prediction=_prediction_head(self, shape, num_classes),
        )

    def __call__(self, features: Features, y: Tensor) -> Tensor:
        l_pred = prediction_loss(features.p, y, self.cross_entropy)
        l_sim = similarity_loss(features.z, y)
        return (1 - self.beta) * l_pred + self.beta * l_sim


def _require_auxiliary(auxiliary: str) -> None:
    try:
        downstream_layers(auxiliary)
    except ValueError as error:
        raise UserError(f"auxiliary is {auxiliary!r} but must {error}") from None


def _prediction_head(loss: Pred | PredSim, shape: Shape, num_classes: int) -> PredictionHead:
    return PredictionHead(shape, num_classes, loss.pool_target, loss.hidden_layers, loss.later)


@dataclass(frozen=True)
class Glob:
    """No local loss: the network is trained by its output layer's loss alone."""

    output_scale: float = 1.0

    def heads(self, shape: Shape, num_classes: int) -> LocalHeads:
        return LocalHeads()

    def __call__(self, features: Features, y: Tensor) -> Tensor:
        return y.new_zeros(())


@dataclass(frozen=True)
class Output:
    """The output layer's loss, scale · CrossEntropy(Y, H): its activation is the prediction. It has
    the form of a local loss, so that the output layer trains like every stage."""

    scale: float = 1.0
    cross_entropy: CrossEntropy = PLAIN

    @property
    def output_scale(self) -> float:
        return self.scale

    def heads(self, shape: Shape, num_classes: int) -> LocalHeads:
        return LocalHeads(prediction=Float32Identity())

    def __call__(self, features: Features, y: Tensor) -> Tensor:
        return self.scale * prediction_loss(features.p, y, self.cross_entropy)


class Float32Identity(nn.Module):
    """The identity of h, at least in float32."""

    def forward(self, h: Tensor) -> Tensor:
        return widened(h)
