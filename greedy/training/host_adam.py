"""Adam whose moments are in host memory."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn


class HostAdam(torch.optim.Adam):
    """Adam for parameters on a device, computed by the CPU: of what is as large as the weights,
    the device holds weights and gradients alone. Each step copies both to the host and the
    weights back."""

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float) -> None:
        self.trained = list(parameters)
        pinned = self.trained[0].device.type == "cuda"
        super().__init__(
            [
                nn.Parameter(torch.empty(p.shape, dtype=p.dtype, pin_memory=pinned))
                for p in self.trained
            ],
            lr=lr,
            fused=True,
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Takes one step with the gradients of the parameters on the device."""
        pairs = list(zip(self.param_groups[0]["params"], self.trained, strict=True))
        for mine, trained in pairs:
            mine.copy_(trained)
            mine.grad = None if trained.grad is None else trained.grad.cpu()
        # Set by the guard, on the device: torch would copy it without waiting, and read it at once.
        if (bad := getattr(self, "found_inf", None)) is not None:
            self.found_inf = bad.cpu()
        super().step(closure)
        for mine, trained in pairs:
            trained.copy_(mine)
            mine.grad = None
