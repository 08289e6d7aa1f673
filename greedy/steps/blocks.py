"""The gradients of a stage of any kind with only a micro-batch of activations in memory.

What ``greedy.steps.exact`` does for a single layer, ``greedy.exact`` does for every module whose
samples meet in batch norms alone. c are then the outputs of all layers before the last batch norm.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from greedy.base.ranks import Shares
from greedy.exact.passes import Keep, Passes
from greedy.exact.replay import Replay
from greedy.exact.schedule import Schedule
from greedy.losses import Features, LocalHeads, LocalLoss
from greedy.models import Stage
from greedy.runs.choices import Mode
from greedy.steps.exact import differentiate
from greedy.steps.scaling import LossScale
from greedy.steps.shared import add_gradients, gathered, own_rows


class StageWithHeads(nn.Module):
    """A stage with its local heads: gives the features of inputs that are flattened already."""

    def __init__(self, stage: Stage, heads: LocalHeads, autocast: torch.autocast) -> None:
        super().__init__()
        self.layer, self.heads, self.autocast = stage.layer, heads, autocast

    def forward(self, x: Tensor) -> Features:
        with self.autocast:
            features: Features = self.heads(self.layer(x))
        return features


@dataclass
class BlockStep:
    """The gradients of one batch of a stage, computed in passes over micro-batches.

    Attributes:
        module: the stage with its heads.
        loss: the local loss of the stage.
        mode: the memory mode, any but ``plain``.
        slices: the rows of each micro-batch.
        x: the stage's input (B, ...), in host memory if the mode streams it.
        device: where the stage is.
        scale: the factor on the loss, and so on all gradients; ``None`` for 1.
        schedule: the passes that the module needs; ``None`` until a step has learned them.
        fake: whether tensors have no numbers.
        shares: of the processes that compute the batch, where x and slices are of the rows of this
            one; ``None`` for one alone.
    """

    module: StageWithHeads
    loss: LocalLoss
    mode: Mode
    slices: Sequence[slice]
    x: Tensor
    device: torch.device
    scale: LossScale | None = None
    schedule: Schedule | None = None
    fake: bool = False
    shares: Shares | None = None

    def gradients(self, y: Tensor) -> tuple[Tensor, Tensor | None]:
        """Puts the gradients of the batch's loss into every parameter's ``grad``.

        Args:
            y: the targets of the loss, a row for each sample.

        Returns:
            The loss, a scalar, and the logits (B, classes), ``None`` without a local classifier.
        """
        for parameter in self.module.parameters():
            parameter.grad = None
        with Replay([self.module], self.device, fake=self.fake) as replay:
            passes = Passes(
                self.module,
                self.x,
                self.slices,
                self.device,
                replay,
                schedule=self.schedule,
                keep=Keep(layers=self.mode.keeps_c, gradients=self.mode.keeps_gradient),
                shares=self.shares,
            )
            self.schedule = passes.schedule
            features = gathered(passes.outputs(), self.shares)
            loss, slopes = differentiate(self.loss, features, y, self.scale)
            passes.backward(own_rows(slopes, self.shares))
        passes.update_running()
        add_gradients(self.module.parameters(), self.shares)
        return loss, self.module.heads.logits(features)
