"""Modules one after the other, each with passes of its own."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from greedy.base.ranks import Shares
from greedy.exact.passes import Passes
from greedy.exact.replay import Replay
from greedy.exact.rows import each_tensor
from greedy.exact.schedule import Schedule


class Chain:
    """One batch through modules in order, forward and backward. Each takes what the one before
    gives, and gives outputs of its own and what the next one takes.

    What passes from one to the next is kept for the whole batch, so that the passes over a module
    do not begin at the first one: with k batch norms in the chain they cost in proportion to k.

    Args:
        modules: the modules. The last gives ``None`` for the next.
        x: what the first one takes, (B, ...).
        more: what each takes besides, ``None`` for nothing.
        slices: the rows of each micro-batch.
        device: the device of the modules.
        home: the device where what passes between them is kept.
        replay: the random numbers and buffers of the modules, in the same order.
        schedules: the passes that each needs; ``None`` to learn them.
        shares: as for ``Passes``.
    """

    def __init__(
        self,
        modules: Sequence[nn.Module],
        x: Tensor,
        more: Sequence[Tensor | None],
        slices: Sequence[slice],
        device: torch.device,
        home: torch.device,
        replay: Replay,
        schedules: Sequence[Schedule] | None = None,
        shares: Shares | None = None,
    ) -> None:
        self.modules, self.x, self.more, self.slices = modules, x, more, slices
        self.device, self.home, self.replay = device, home, replay
        self.schedules, self.shares = schedules, shares
        self.passes: list[Passes] = []

    def outputs(self) -> list[Any]:
        """Computes the own outputs of every module for all rows, without gradient."""
        x, outputs = self.x, []
        for number, (module, more) in enumerate(zip(self.modules, self.more, strict=True)):
            passes = Passes(
                module,
                (x,) if more is None else (x, more),
                self.slices,
                self.device,
                self.replay,
                part=number,
                schedule=self.schedules[number] if self.schedules else None,
                shares=self.shares,
                home=self.home,
            )
            own, x = passes.outputs()
            outputs.append(each_tensor(lambda t: t.to(self.device), own))
            if x is not None:
                x.requires_grad_()
            self.passes.append(passes)
        return outputs

    def backward(self, slopes: Sequence[Any]) -> None:
        """Adds the parameters' gradients to their ``grad``, given those of the modules' own
        outputs; ``None`` for one without."""
        x_slope = None
        for passes, own in zip(reversed(self.passes), reversed(slopes), strict=True):
            x_slope, *_ = passes.backward((own, x_slope))
            passes.inputs = ()

    def update_running(self) -> None:
        """Updates the running statistics of all batch norms as one forward pass would."""
        for passes in self.passes:
            passes.update_running()
