"""Adam whose moments are in host memory."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn


class HostAdam(torch.optim.Adam):
    """Adam for parameters on a device, computed by the CPU: the device holds weights and gradients
    but no moments. Each step copies both to the host and the weights back; from CUDA through
    page-locked memory, all copies at once."""

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float) -> None:
        self.trained = list(parameters)
        self._pinned = self.trained[0].device.type == "cuda"
        self._gradients = [self._beside(p) if self._pinned else None for p in self.trained]
        super().__init__([nn.Parameter(self._beside(p)) for p in self.trained], lr=lr, fused=True)

    def _beside(self, parameter: nn.Parameter) -> Tensor:
        """Returns an empty tensor on the host, like a parameter."""
        return torch.empty_like(parameter, device="cpu", pin_memory=self._pinned)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Takes one step with the gradients of the parameters on the device."""
        pairs = list(zip(self.param_groups[0]["params"], self.trained, strict=True))
        for (on_host, trained), place in zip(pairs, self._gradients, strict=True):
            on_host.copy_(trained, non_blocking=self._pinned)
            if trained.grad is None or place is None:
                on_host.grad = None if trained.grad is None else trained.grad.cpu()
            else:
                on_host.grad = place.copy_(trained.grad, non_blocking=True)
        # The guard sets it on the device; torch would copy it and read it without waiting.
        if (bad := getattr(self, "found_inf", None)) is not None:
            self.found_inf = bad.cpu()
        if self._pinned:
            torch.cuda.current_stream(self.trained[0].device).synchronize()
        super().step(closure)
        for on_host, trained in pairs:
            trained.copy_(on_host, non_blocking=self._pinned)
            on_host.grad = None
