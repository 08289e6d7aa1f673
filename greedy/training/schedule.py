"""The learning rate over the epochs of a stage."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

IMPROVEMENT = 0.001  # a relative gain below this does not count
LAST_DROP = 4  # after this many drops a patient stage ends


def warm_up(epoch: int, epochs: int) -> float:
    """Returns the factor on the rate in an epoch, counted from 0, while it rises evenly over the
    first ``epochs`` epochs and reaches 1 in the next."""
    return min(1.0, (epoch + 1) / (epochs + 1))


@dataclass(frozen=True)
class Milestones:
    """A schedule that multiplies the rate by ``decay`` after each epoch in ``milestones``, as
    section 4 of the paper does, after ``warmup`` epochs in which it rises."""

    rate: float
    decay: float
    milestones: Sequence[int]
    warmup: int = 0

    def factor_at(self, epoch: int) -> float:
        """Returns the factor on the first rates in an epoch, counted from 0."""
        return warm_up(epoch, self.warmup) * self.decay ** self.drops(epoch)

    def drops(self, epoch: int) -> int:
        """Returns how often the rate has dropped before an epoch, counted from 0."""
        return sum(m <= epoch for m in self.milestones)

    def observe(self, holdout_loss: float | None) -> bool:
        """Returns ``False``: milestones do not depend on losses, and no stage ends early."""
        return False


@dataclass(frozen=True)
class Cosine:
    """A schedule by which the rate falls along half a cosine from its first value towards 0 at the
    end of ``epochs`` epochs, after the first ``warmup`` of them, in which it rises."""

    rate: float
    epochs: int
    warmup: int = 0

    def factor_at(self, epoch: int) -> float:
        """Returns the factor on the first rates in an epoch, counted from 0."""
        if epoch < self.warmup:
            return warm_up(epoch, self.warmup)
        return (1 + math.cos(math.pi * (epoch - self.warmup) / (self.epochs - self.warmup))) / 2

    def drops(self, epoch: int) -> int:
        """Returns 1 in epochs, counted from 0, in which the rate is below its first value for good,
        else 0."""
        return int(epoch > self.warmup)

    def observe(self, holdout_loss: float | None) -> bool:
        """Returns ``False``: the cosine does not depend on losses, and no stage ends early."""
        return False


@dataclass
class Patience:
    """A schedule that multiplies the rate by ``decay`` whenever the held-out loss has not improved
    by 0.1 % for ``epochs`` epochs, and ends the stage after the fourth time; in the first
    ``warmup`` epochs the rate rises."""

    rate: float
    decay: float
    epochs: int
    best: float = float("inf")
    waited: int = 0
    dropped: int = 0
    warmup: int = 0

    def factor_at(self, epoch: int) -> float:
        """Returns the factor on the first rates now, in an epoch counted from 0."""
        return warm_up(epoch, self.warmup) * self.decay**self.dropped

    def drops(self, epoch: int) -> int:
        """Returns how often the rate has dropped so far."""
        return self.dropped

    def observe(self, holdout_loss: float | None) -> bool:
        """Takes the held-out loss of an epoch. Returns whether the stage ends."""
        assert holdout_loss is not None
        if holdout_loss < self.best * (1 - math.copysign(IMPROVEMENT, self.best)):
            self.best, self.waited = holdout_loss, 0
            return False
        self.waited += 1
        if self.waited == self.epochs:
            self.dropped, self.waited = self.dropped + 1, 0
        return self.dropped == LAST_DROP


Schedule = Milestones | Cosine | Patience

FIRST = "initial_lr"  # in a group: torch's name for the rate that a schedule scales


def set_first_rates(optimizers: Iterable[torch.optim.Optimizer], rate: float | None = None) -> None:
    """Records the first rate of each parameter group that has none recorded: ``rate``, or without
    it the group's own. A group without a rate is left as it is."""
    for group in chain.from_iterable(optimizer.param_groups for optimizer in optimizers):
        if (group_rate := group.get("lr")) is not None and FIRST not in group:
            group[FIRST] = float(group_rate) if rate is None else rate


def scale_rates(optimizers: Sequence[torch.optim.Optimizer], factor: float) -> None:
    """Sets the rate of each parameter group to ``factor`` times its first rate."""
    for group in chain.from_iterable(optimizer.param_groups for optimizer in optimizers):
        if (first := group.get(FIRST)) is None:
            continue
        if isinstance(group["lr"], Tensor):  # some optimisers are compiled with this tensor
            group["lr"].fill_(first * factor)
        else:
            group["lr"] = first * factor
