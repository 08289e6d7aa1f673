"""How a trained network's forward pass fits a memory budget."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call

from greedy.errors import UserError
from greedy.memory.choice import reserved
from greedy.memory.counting import Counter
from greedy.models import Shape
from greedy.sizes import format_size

LARGEST_BATCH = 256


@dataclass(frozen=True)
class Forward:
    """The rows computed at a time, and whether all weights are on the device meanwhile or only
    those of the module that computes."""

    rows: int
    resident: bool

    def __call__(self, network: nn.Sequential, x: Tensor) -> Tensor:
        """The network's output for inputs on a device."""
        if self.resident:
            out: Tensor = network.to(x.device)(x)
            return out
        for module in network:
            x = module.to(x.device)(x)
            module.to("cpu")
        return x


def fit_forward(network: nn.Sequential, shape: Shape, budget: int, device_type: str) -> Forward:
    """The largest batch of raw images of ``shape`` that fits a budget of bytes; with all weights
    on the device if that leaves room for a row. On a CPU they are in its memory anyway.

    Raises ``UserError`` where not even one row fits.
    """
    for way in _ways(device_type):
        peak = reserved(_peak(network, shape, way), device_type)
        if peak <= budget:
            return way
    raise UserError(
        f"the network's forward pass takes at least {format_size(peak)} and the memory budget is "
        f"{format_size(budget)}: raise --memory-budget"
    )


def _ways(device_type: str) -> Iterator[Forward]:
    for resident in (True,) if device_type == "cpu" else (True, False):
        rows = LARGEST_BATCH
        while rows:
            yield Forward(rows, resident)
            rows //= 2


def _peak(network: nn.Sequential, shape: Shape, way: Forward) -> int:
    """Bytes on the device at most, counted on fake tensors."""
    states = [module.state_dict(keep_vars=True) for module in network]
    with FakeTensorMode(), Counter() as counter, torch.no_grad():
        held = [_like(state) for state in states] if way.resident else None
        raw = torch.empty((way.rows, *shape), dtype=torch.uint8)
        x = raw.float() / 255
        for number, module in enumerate(network):
            weights = held[number] if held else _like(states[number])
            x = functional_call(module, weights, (x,))
            del weights
    return counter.peak


def _like(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: torch.empty(v.shape, dtype=v.dtype) for k, v in state.items()}
