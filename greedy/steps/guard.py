"""Protection of the weights from steps whose loss or gradients are not finite."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from greedy.base.precision import all_finite
from greedy.base.torch_private import skips_on_device
from greedy.steps.scaling import LossScale


class OptimizerFailed(Exception):
    """An optimiser failed within its step, which may have changed some of the weights. The
    ``__cause__`` is its error."""


@dataclass
class Guard:
    """Keeps steps whose loss or gradients are not finite from changing parameters, and notes the
    first such step on the device. Only reading ``step`` and ``in_loss`` waits for the device.

    Attributes:
        clip: the largest norm of the gradients of an update, above which they are scaled down to
            it; 0 for any.
    """

    clip: float = 0.0
    _first: Tensor | None = None
    _in_loss: Tensor | None = None

    def update(
        self,
        optimizer: torch.optim.Optimizer,
        loss: Tensor,
        step: int,
        parameters: Sequence[nn.Parameter],
        scale: LossScale | None = None,
    ) -> None:
        """Takes the optimiser's step unless the loss or a gradient is not finite.

        Args:
            loss: the loss of the step, a scalar, not scaled.
            step: the number of the step in its epoch, counted from 0.
            parameters: the parameters with their gradients.
            scale: the factor on the gradients, by which they are divided first. Gradients that are
                not finite are then noted only if no smaller factor would help.

        Raises:
            OptimizerFailed: the optimiser raised an error.
        """
        in_loss = ~torch.isfinite(loss.detach())
        if scale is None:
            skipped = in_loss | ~all_finite(p.grad for p in parameters if p.grad is not None)
            bad = skipped
        else:
            skipped = in_loss | scale.unscale(parameters)
            bad = in_loss | scale.exhausted
        self._note(step, bad, in_loss)
        if self.clip:
            nn.utils.clip_grad_norm_(parameters, self.clip)
        try:
            if skips_on_device(optimizer):
                optimizer.found_inf = skipped.float()  # type: ignore[attr-defined]
                optimizer.step()
            elif not skipped:  # other optimisers have to wait for the device
                optimizer.step()
        except Exception as error:
            raise OptimizerFailed from error

    def _note(self, step: int, bad: Tensor, in_loss: Tensor) -> None:
        if self._first is None or self._in_loss is None:
            self._first = torch.full_like(bad, -1, dtype=torch.int64)
            self._in_loss = torch.zeros_like(bad)
        new = (self._first < 0) & bad
        self._first = torch.where(new, step, self._first)
        self._in_loss = torch.where(new, in_loss, self._in_loss)

    @property
    def step(self) -> int | None:
        """The first step of the epoch that was not finite, counted from 1."""
        number = -1 if self._first is None else int(self._first)
        return number + 1 if number >= 0 else None

    @property
    def in_loss(self) -> bool:
        """Whether that step's loss was not finite, and not its gradients alone."""
        return self._in_loss is not None and bool(self._in_loss)
