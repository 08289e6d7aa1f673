"""The learning rate over the epochs of a stage."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

IMPROVEMENT = 0.001  # a relative gain below this does not count
LAST_DROP = 4  # after this many drops a patient stage ends


@dataclass(frozen=True)
class Milestones:
    """The rate is multiplied by ``decay`` after each epoch in ``milestones`` (section 4)."""

    rate: float
    decay: float
    milestones: Sequence[int]

    def factor_at(self, epoch: int) -> float:
        """The factor on the first rates in an epoch, counted from 0."""
        return self.decay ** self.drops(epoch)

    def drops(self, epoch: int) -> int:
        """The number of drops of the rate before this epoch."""
        return sum(m <= epoch for m in self.milestones)

    def observe(self, holdout_loss: float | None) -> bool:
        """Milestones do not look at losses: the stage never ends early."""
        return False


@dataclass
class Patience:
    """The rate drops whenever the held-out loss has not improved by 0.1 % for ``epochs``
    epochs; after the fourth drop the stage ends."""

    rate: float
    decay: float
    epochs: int
    best: float = float("inf")
    waited: int = 0
    dropped: int = 0

    def factor_at(self, epoch: int) -> float:
        """The factor on the first rates now."""
        return self.decay**self.dropped

    def drops(self, epoch: int) -> int:
        """The number of drops of the rate so far."""
        return self.dropped

    def observe(self, holdout_loss: float | None) -> bool:
        """Takes an epoch's held-out loss, and says whether the stage ends."""
        assert holdout_loss is not None
        if holdout_loss < self.best * (1 - IMPROVEMENT):
            self.best, self.waited = holdout_loss, 0
            return False
        self.waited += 1
        if self.waited == self.epochs:
            self.dropped, self.waited = self.dropped + 1, 0
        return self.dropped == LAST_DROP


Schedule = Milestones | Patience

FIRST = "initial_lr"  # of a group: torch's own name for what a schedule scales


def set_first_rates(optimizers: Iterable[torch.optim.Optimizer], rate: float | None = None) -> None:
    """Notes the rate that each group begins with, unless it is known: the given rate, or its own. A
    group may have none."""
    for group in chain.from_iterable(each.param_groups for each in optimizers):
        if (own := group.get("lr")) is not None and FIRST not in group:
            group[FIRST] = float(own) if rate is None else rate


def scale_rates(optimizers: Sequence[torch.optim.Optimizer], factor: float) -> None:
    """Sets the rate of each group to ``factor`` times its first one."""
    for group in chain.from_iterable(each.param_groups for each in optimizers):
        if (first := group.get(FIRST)) is None:
            continue
        if isinstance(group["lr"], Tensor):  # some are compiled with it
            group["lr"].fill_(first * factor)
        else:
            group["lr"] = first * factor
