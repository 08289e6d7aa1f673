"""One optimiser step of a stage on one batch."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from greedy.losses import Features, LocalHeads, LocalLoss
from greedy.models import Stage
from greedy.training.guard import Guard


@dataclass
class Learner:
    """A stage with all that exists only while it trains."""

    stage: Stage
    heads: LocalHeads
    loss: LocalLoss
    num_classes: int
    precision: str
    optimizer: torch.optim.Optimizer | None = None

    @property
    def device(self) -> torch.device:
        return next(self.stage.parameters()).device

    def parameters(self) -> list[nn.Parameter]:
        """The encoder's and the heads' parameters."""
        return [*self.stage.parameters(), *self.heads.parameters()]

    def train(self) -> None:
        """Batch statistics are taken and learned from."""
        self.stage.train()
        self.heads.train()

    def eval(self) -> None:
        """Running statistics are used."""
        self.stage.eval()
        self.heads.eval()

    def autocast(self) -> torch.autocast:
        """Lower precision for encoder and heads; features, losses and weights stay float32."""
        return torch.autocast(
            self.device.type, torch.bfloat16, enabled=self.precision == "bfloat16"
        )

    def features(self, x: Tensor) -> Features:
        """Features of inputs (B, *shape) on which dropout has been applied."""
        with self.autocast():
            return self.heads(self.stage.hidden(x))

    def one_hot(self, labels: Tensor) -> Tensor:
        """Y: (B,) to (B, classes)."""
        return F.one_hot(labels, self.num_classes).float()


def step(
    learner: Learner, x: Tensor, labels: Tensor, guard: Guard, position: int
) -> tuple[Tensor, Tensor | None]:
    """Trains on one batch, number ``position`` of its epoch: inputs after dropout (B, *shape),
    labels (B,).

    Returns the loss, a scalar, and the local classifier's logits (B, classes) or ``None``;
    neither is waited for.
    """
    assert learner.optimizer is not None
    learner.optimizer.zero_grad(set_to_none=True)
    features = learner.features(x)
    loss = learner.loss(features, learner.one_hot(labels))
    loss.backward()
    guard.update(learner.optimizer, loss, position)
    return loss.detach(), None if features.p is None else features.p.detach()
