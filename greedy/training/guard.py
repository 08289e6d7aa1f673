"""What happens to a step whose loss is not finite: nothing, and the stage is told later."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from greedy.training.scaling import LossScale


@dataclass
class Guard:
    """Notes on the device the first step whose loss is not finite, and keeps such a step from
    changing a parameter. Nothing waits for it until ``step`` is asked for."""

    first: Tensor | None = None

    def update(
        self,
        optimizer: torch.optim.Optimizer,
        loss: Tensor,
        step: int,
        scale: LossScale | None = None,
        parameters: Iterable[nn.Parameter] = (),
    ) -> None:
        """The optimiser's step, number ``step`` of its epoch, unless its loss is not finite. Where
        the loss was scaled, the gradients of ``parameters`` are unscaled first; if one of them is
        not finite the step is left out too, which is noted only if no scale would help."""
        bad = ~torch.isfinite(loss.detach())
        overflow = bad
        if scale is not None:
            overflow = bad | scale.unscale(parameters)
            bad = bad | scale.exhausted
        if self.first is None:
            self.first = torch.full_like(bad, -1, dtype=torch.int64)
        self.first = torch.where((self.first < 0) & bad, step, self.first)
        if getattr(optimizer, "_step_supports_amp_scaling", False):
            # Torch's own way: fused optimisers look at this on the device, as for GradScaler.
            optimizer.found_inf = overflow.float()  # type: ignore[attr-defined]
            optimizer.step()
        elif not overflow:  # any other has to wait for the answer
            optimizer.step()

    @property
    def step(self) -> int | None:
        """The first step of the epoch that had no finite loss, counted from 1."""
        number = -1 if self.first is None else int(self.first)
        return number + 1 if number >= 0 else None
