"""Loss scaling, for gradients that float16 would round to zero."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from greedy.base.precision import all_finite

FIRST, LEAST = 2.0**16, 2.0**-14
GROWTH_INTERVAL = 2000


class LossScale(nn.Module):
    """The factor on a loss whose gradients pass through float16.

    Rule and numbers are those of ``torch.amp.GradScaler``: the factor is halved when a gradient
    overflows, and that update is skipped; it is doubled after 2,000 steps without an overflow.
    Unlike ``GradScaler`` it needs no optimiser, its state is that of a module, and nothing waits
    for the device.

    Attributes:
        factor: the factor now, a scalar.
        steps: the number of steps since the last overflow or doubling, a scalar.
    """

    factor: Tensor
    steps: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("factor", torch.tensor(FIRST))
        self.register_buffer("steps", torch.tensor(0))

    def forward(self, loss: Tensor) -> Tensor:
        """Returns the loss times the factor."""
        return loss * self.factor

    @torch.no_grad()
    def unscale(self, parameters: Iterable[nn.Parameter]) -> Tensor:
        """Divides the gradients by the factor, then sets the factor for the next step. Returns
        whether a gradient was not finite, a bool tensor on the device."""
        gradients = [p.grad for p in parameters if p.grad is not None]
        for gradient in gradients:
            gradient.div_(self.factor)
        overflow = ~all_finite(gradients)
        self.steps.copy_(torch.where(overflow, 0, self.steps + 1))
        grown = torch.where(self.steps >= GROWTH_INTERVAL, 2 * self.factor, self.factor)
        self.steps.remainder_(GROWTH_INTERVAL)
        self.factor.copy_(torch.where(overflow, self.factor / 2, grown))
        return overflow

    @property
    def exhausted(self) -> Tensor:
        """Whether even the smallest factor did not keep the gradients finite, a bool tensor."""
        return self.factor < LEAST
