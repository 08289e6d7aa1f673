"""Optimisers whose state is in host memory."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn


def parameter_groups(
    parameters: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
) -> list[dict[str, Any]]:
    """Returns what torch's optimisers take, parameters or groups of them, as groups."""
    given: list[Any] = list(parameters)
    return given if isinstance(given[0], dict) else [{"params": given}]


class OnHost(torch.optim.Optimizer):
    """An optimiser for parameters on a device, computed by the CPU: the device holds weights and
    gradients but no state. Each step copies both to the host and the weights back; from CUDA
    through page-locked memory, all copies at once. Among a class's parents it comes before a fused
    optimiser."""

    def __init__(
        self, parameters: Iterable[nn.Parameter] | Iterable[dict[str, Any]], **settings: Any
    ) -> None:
        groups = parameter_groups(parameters)
        self.trained: list[nn.Parameter] = [p for group in groups for p in group["params"]]
        self._pinned = self.trained[0].device.type == "cuda"
        self._gradients = [self._beside(p) if self._pinned else None for p in self.trained]
        on_host = [
            group | {"params": [nn.Parameter(self._beside(p)) for p in group["params"]]}
            for group in groups
        ]
        super().__init__(on_host, **settings, fused=True)  # type: ignore[call-arg]

    def _beside(self, parameter: nn.Parameter) -> Tensor:
        """Returns an empty tensor on the host, like a parameter."""
        return torch.empty_like(parameter, device="cpu", pin_memory=self._pinned)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Takes one step with the gradients of the parameters on the device."""
        copies = [p for group in self.param_groups for p in group["params"]]
        pairs = list(zip(copies, self.trained, strict=True))
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


class HostAdam(OnHost, torch.optim.Adam):
    """Adam whose moments are in host memory."""


class HostSGD(OnHost, torch.optim.SGD):
    """SGD whose momentum is in host memory."""
