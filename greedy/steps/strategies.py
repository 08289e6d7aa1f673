"""The strategies by which stages are trained, together or one of them alone.

All strategies share the stages, the losses and the loop; they differ in which stages share a graph
and an optimiser.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from greedy.base.ranks import Shares
from greedy.base.relay import Relay
from greedy.base.seeds import derive_seed, seed_torch
from greedy.exact.schedule import Schedule
from greedy.models.stages import dropped
from greedy.steps.guard import Guard
from greedy.steps.scaling import LossScale
from greedy.steps.shared import add_gradients, gradients_added, shared_norms, whole_features
from greedy.steps.step import Learner, step
from greedy.steps.whole import whole_gradients
from greedy.stores.source import Batch


class Outcome(NamedTuple):
    """The result of a stage's step on a batch.

    Attributes:
        loss: a scalar.
        logits: the local classifier's logits (B, classes); ``None`` without a classifier.
    """

    loss: Tensor
    logits: Tensor | None


WHOLE = "the network"  # the title if all stages train

Masks = Sequence[Tensor | None]  # the dropout mask on each stage's input, for a whole batch


class Strategy(Protocol):
    """The stages that the loop trains, and how it trains them."""

    @property
    def title(self) -> str:
        """The name of what is trained, for messages."""

    @property
    def number(self) -> int:
        """The number of the first stage that trains, which names the streams of random numbers."""

    @property
    def learners(self) -> Sequence[Learner]:
        """The learners of the stages, in order."""

    @property
    def optimizers(self) -> Sequence[torch.optim.Optimizer]:
        """The optimisers that take a step on each batch."""

    def step(self, batch: Batch, masks: Masks, guard: Guard, position: int) -> list[Outcome]:
        """Trains on one batch, number ``position`` of its epoch. Returns the outcome of each
        stage."""


@dataclass(frozen=True)
class Greedy:
    """One stage, trained from its source; the stages before it are frozen."""

    learner: Learner

    @property
    def title(self) -> str:
        return f"stage {self.number}"

    @property
    def number(self) -> int:
        return self.learner.stage.number

    @property
    def learners(self) -> Sequence[Learner]:
        return (self.learner,)

    @property
    def optimizers(self) -> Sequence[torch.optim.Optimizer]:
        return _optimizers(self.learners)

    def step(self, batch: Batch, masks: Masks, guard: Guard, position: int) -> list[Outcome]:
        masked = replace(batch, mask=masks[0])
        return [Outcome(*step(self.learner, masked, guard, position))]


@dataclass(frozen=True)
class Joint:
    """All stages in one forward pass, each trained on its loss by its optimiser, as in the authors'
    published code. No gradient passes from a stage to the one before, and the next stage gets the
    output from before this one's step.

    Attributes:
        learners: the learners of all stages, in order; of those of this process where several train
            the stages.
        relay: the processes that do.
    """

    learners: Sequence[Learner]
    relay: Relay = field(default_factory=Relay)
    number = 1

    @property
    def title(self) -> str:
        return WHOLE

    @property
    def optimizers(self) -> Sequence[torch.optim.Optimizer]:
        return _optimizers(self.learners)

    def step(self, batch: Batch, masks: Masks, guard: Guard, position: int) -> list[Outcome]:
        x, seed = batch.inputs(), torch.initial_seed()
        outcomes = []
        for learner, mask, optimizer in zip(self.learners, masks, self.optimizers, strict=True):
            # The same for a stage whichever processes train those before it.
            seed_torch(derive_seed(seed, "stage", learner.stage.number), learner.device)
            _clear(learner)
            with shared_norms(batch.shares):
                h = learner.hidden(dropped(x, mask))
                outcome = _outcome(learner, h, learner.targets(batch), batch.shares)
            with gradients_added(learner.parameters(), batch.shares):
                _scaled(outcome.loss, learner.scale).backward()
            x = learner.stage.pool(h.detach())
            del h
            guard.update(optimizer, outcome.loss, position, learner.parameters(), learner.scale)
            _clear(learner)
            outcomes.append(_detached(outcome))
        self.relay.send(x, training=True)
        return outcomes


@dataclass(frozen=True)
class Backprop:
    """All stages trained by the gradient of the sum of their losses, with one optimiser. Either
    only the output layer has a loss, or every stage has. In float16 the first learner's scale is
    that of the sum.

    Attributes:
        learners: the learners of the stages, in order.
        optimizer: the optimiser of all parameters.
        accumulate: number of micro-batches that a batch is cut into, whose gradients are added up.
            Batch norm, and losses that couple samples, then see only one micro-batch.
        exact: whether they see the whole batch nevertheless.
    """

    learners: Sequence[Learner]
    optimizer: torch.optim.Optimizer
    accumulate: int = 1
    exact: bool = False
    number = 1
    _schedules: list[Schedule] = field(default_factory=list, init=False, repr=False)

    @property
    def title(self) -> str:
        return WHOLE

    @property
    def optimizers(self) -> Sequence[torch.optim.Optimizer]:
        return (self.optimizer,)

    def step(self, batch: Batch, masks: Masks, guard: Guard, position: int) -> list[Outcome]:
        for learner in self.learners:
            _clear(learner)
        parameters = _parameters(self.learners)
        if self.exact:
            outcomes = self._exact_gradients(batch, masks)
            add_gradients(parameters, batch.shares)
        else:
            outcomes = self._gradients(batch, masks, parameters)
        guard.update(self.optimizer, _sum(outcomes), position, parameters, self.learners[0].scale)
        return outcomes

    def _exact_gradients(self, batch: Batch, masks: Masks) -> list[Outcome]:
        slices = self._micro_batches(batch.rows)
        found = whole_gradients(self.learners, batch, masks, slices, self._schedules)
        return [Outcome(*each) for each in found]

    def _gradients(
        self, batch: Batch, masks: Masks, parameters: list[nn.Parameter]
    ) -> list[Outcome]:
        parts = []
        slices = self._micro_batches(len(batch.labels))
        for rows in slices:
            share = (rows.stop - rows.start) / len(batch.labels)
            outcomes = [
                Outcome(share * loss, logits) for loss, logits in self._forward(batch, masks, rows)
            ]
            complete = batch.shares if rows is slices[-1] else None
            with gradients_added(parameters, complete):
                _scaled(_sum(outcomes), self.learners[0].scale).backward()
            parts.append([_detached(outcome) for outcome in outcomes])
        return [_joined(stage_parts) for stage_parts in zip(*parts, strict=True)]

    def _micro_batches(self, count: int) -> list[slice]:
        """Returns the rows of each micro-batch of a batch: nearly equally many, and at least two,
        which batch norm needs."""
        number = max(1, min(self.accumulate, count // 2))
        edges = [count * i // number for i in range(number + 1)]
        slices = [slice(start, stop) for start, stop in pairwise(edges)]
        # Two show how much memory all of them take.
        return slices[:2] if self.learners[0].memory_trial else slices

    def _forward(self, batch: Batch, masks: Masks, rows: slice) -> list[Outcome]:
        mixture = batch.mixture
        mixed = mixture.stage(len(self.learners)) if mixture else 0
        own, shares = batch.shares.part(rows) if batch.shares else (rows, None)
        x = batch.read(own) if mixed else batch.inputs(own)
        outcomes = []
        for number, (learner, mask) in enumerate(zip(self.learners, masks, strict=True)):
            if mixture and mixed and number == mixed:
                x = mixture.whole(x)
            with shared_norms(shares):
                h = learner.hidden(dropped(x, mask, own))
                outcomes.append(_outcome(learner, h, learner.targets(batch)[rows], shares))
            x = learner.stage.pool(h)
        return outcomes


def together(
    strategy: str,
    learners: Sequence[Learner],
    accumulate: int,
    optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
    *,
    exact: bool = False,
    relay: Relay | None = None,
) -> Joint | Backprop:
    """Returns a strategy that trains all stages of a network.

    Args:
        strategy: ``joint``, or the name of a strategy that trains with one graph.
        learners: the learners of all stages, in order.
        accumulate: as for ``Backprop``.
        optimizer: makes the optimiser of some parameters.
        exact: as for ``Backprop``.
        relay: as for ``Joint``.
    """
    if strategy == "joint":
        for learner in learners:
            learner.optimizer = optimizer(learner.parameters())
        return Joint(learners, relay or Relay())
    return Backprop(learners, optimizer(_parameters(learners)), accumulate, exact)


def _optimizers(learners: Sequence[Learner]) -> list[torch.optim.Optimizer]:
    return [learner.optimizer for learner in learners if learner.optimizer is not None]


def _parameters(learners: Sequence[Learner]) -> list[nn.Parameter]:
    """Returns the parameters of all stages, once each where stages share some."""
    every = (parameter for learner in learners for parameter in learner.parameters())
    return list(dict.fromkeys(every))


def _clear(learner: Learner) -> None:
    for parameter in learner.parameters():
        parameter.grad = None


def _scaled(loss: Tensor, scale: LossScale | None) -> Tensor:
    return loss if scale is None else scale(loss)


def _outcome(learner: Learner, h: Tensor, y: Tensor, shares: Shares | None) -> Outcome:
    features = whole_features(learner.local(h), shares)
    return Outcome(learner.loss(features, y), learner.heads.logits(features))


def _detached(outcome: Outcome) -> Outcome:
    return Outcome(outcome.loss.detach(), outcome.logits)


def _sum(outcomes: Sequence[Outcome]) -> Tensor:
    return torch.stack([outcome.loss for outcome in outcomes]).sum()


def _joined(parts: Sequence[Outcome]) -> Outcome:
    """Returns a stage's outcome on a batch, given those on its micro-batches, whose losses add up
    to the batch's."""
    logits = [part.logits for part in parts if part.logits is not None]
    return Outcome(_sum(parts), torch.cat(logits) if logits else None)
