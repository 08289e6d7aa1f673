"""The gradients of a network on a whole batch with a micro-batch of activations in memory."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from greedy.exact.chain import Chain
from greedy.exact.replay import Replay
from greedy.exact.rows import each_tensor, write_rows
from greedy.exact.schedule import Schedule
from greedy.losses import Features
from greedy.models.stages import dropped
from greedy.steps.shared import gathered, own_rows
from greedy.steps.step import Learner
from greedy.stores.source import Batch


class StageInNetwork(nn.Module):
    """A stage with its heads: gives its features and the next stage's input, ``None`` for the last
    stage."""

    def __init__(self, learner: Learner, *, is_last: bool) -> None:
        super().__init__()
        self.stage, self.heads = learner.stage, learner.heads
        self.learner, self.is_last = learner, is_last

    def forward(self, x: Tensor, mask: Tensor | None = None) -> tuple[Features, Tensor | None]:
        h = self.learner.hidden(dropped(x, mask))
        return self.learner.local(h), None if self.is_last else self.stage.pool(h)


def whole_gradients(
    learners: Sequence[Learner],
    batch: Batch,
    masks: Sequence[Tensor | None],
    slices: Sequence[slice],
    schedules: list[Schedule],
) -> list[tuple[Tensor, Tensor | None]]:
    """Adds the gradients of the sum of all stages' losses, times the first one's scale, to every
    parameter's ``grad``. The stages' outputs for the batch are in host memory meanwhile.

    Args:
        learners: the stages of the network, in order.
        batch: gives the images.
        masks: the dropout mask on each stage's input.
        slices: of each micro-batch, the rows that this process computes.
        schedules: the passes of each stage, empty until a step has learned them.

    Returns:
        Each stage's loss, a scalar, and logits (B, classes), ``None`` without a classifier.
    """
    parts = [StageInNetwork(learner, is_last=learner is learners[-1]) for learner in learners]
    device, host = learners[0].device, learners[0].host
    with Replay(parts, device, fake=learners[0].memory_trial) as replay:
        x = _images(batch, slices, host)
        chain = Chain(parts, x, masks, slices, device, host, replay, schedules, batch.shares)
        outcomes, slopes = _differentiated(learners, chain.outputs(), batch)
        chain.backward(slopes)
    chain.update_running()
    schedules[:] = [passes.schedule for passes in chain.passes]
    return outcomes


def _images(batch: Batch, slices: Sequence[slice], host: torch.device) -> Tensor:
    """Returns the inputs of the first stage, in host memory, read a micro-batch at a time."""
    x: Tensor | None = None
    for rows in slices:
        x = write_rows(x, batch.rows, rows, batch.inputs(rows).to(host))
    assert x is not None
    return x


@torch.enable_grad()
def _differentiated(
    learners: Sequence[Learner], features: list[Any], batch: Batch
) -> tuple[list[tuple[Tensor, Tensor | None]], list[Any]]:
    """Returns each stage's loss and logits, and the gradients of the features."""
    whole = [gathered(found, batch.shares) for found in features]
    leaves = each_tensor(Tensor.requires_grad_, whole)
    pairs = list(zip(learners, leaves, strict=True))
    losses = [learner.loss(found, learner.targets(batch)) for learner, found in pairs]
    total, scale = torch.stack(losses).sum(), learners[0].scale
    (total if scale is None else scale(total)).backward()
    logits = [learner.heads.logits(found) for learner, found in pairs]
    outcomes = [(loss.detach(), each) for loss, each in zip(losses, logits, strict=True)]
    slopes = each_tensor(lambda t: t.grad, leaves)
    return outcomes, [own_rows(slope, batch.shares) for slope in slopes]
