"""How a trained network's forward pass fits a memory budget, and leaves the network as it was."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.func import functional_call

from greedy.base.errors import UserError
from greedy.base.sizes import format_size
from greedy.memory.choice import reserved
from greedy.memory.counting import Counter
from greedy.memory.fake import fake_tensors, materialised
from greedy.models import Shape
from greedy.models.skeleton import skeleton

LARGEST_BATCH = 256

Named = dict[str, Tensor]


@dataclass
class Forward:
    """A network in evaluation mode, without gradients; it stays as it was, on its own device.

    Attributes:
        rows: computed at a time.
        resident: whether all weights are on the inputs' device meanwhile, or only those of the
            module that computes. They stay there as long as this lives.
    """

    network: nn.Sequential
    rows: int
    resident: bool
    _held: Named | None = field(default=None, init=False, repr=False)

    @torch.no_grad()  # and not in inference mode, whose tensors a module could keep
    def __call__(self, x: Tensor) -> Tensor:
        """The network's output for inputs on a device."""
        with _evaluating(self.network):
            if self.resident:
                if self._held is None:
                    self._held = _placed(self.network, x.device)
                return _called(self.network, self._held, x)
            for module in self.network:
                x = _called(module, _placed(module, x.device), x)
            return x


def fit_forward(network: nn.Sequential, shape: Shape, budget: int, device_type: str) -> Forward:
    """The forward pass with the largest batch of raw images of ``shape`` that fits a budget of
    bytes; with all weights on the device if that leaves room for a row, or they are there anyway.

    Raises ``UserError`` where not even one row fits.
    """
    for resident in (True,) if _is_on(network, device_type) else (True, False):
        rows = LARGEST_BATCH
        while rows:
            forward = Forward(network, rows, resident)
            peak = reserved(_peak(forward, shape, device_type), device_type)
            if peak <= budget:
                return forward
            rows //= 2
    raise UserError(
        f"the network's forward pass takes at least {format_size(peak)} and the memory budget is "
        f"{format_size(budget)}: raise --memory-budget"
    )


@contextmanager
def _evaluating(network: nn.Module) -> Iterator[None]:
    """Evaluation mode, by the modules' flags: their own ``train`` may do more than set them."""
    flags = [(module, module.training) for module in network.modules()]
    try:
        for module, _ in flags:
            module.training = False
        yield
    finally:
        for module, flag in flags:
            module.training = flag


def _placed(module: nn.Module, device: torch.device) -> Named:
    """Parameters and buffers on a device, by name, of a module with two names by its first. What
    is one tensor under two names stays one. Parameters that are there already are these
    themselves; of buffers, which a module may write to, there are copies."""
    found: Named = {}
    there: dict[int, Tensor] = {}
    for prefix, each in module.named_modules():
        for copy, named in ((False, each.named_parameters), (True, each.named_buffers)):
            for name, tensor in named(prefix, recurse=False, remove_duplicate=False):
                if id(tensor) not in there:
                    there[id(tensor)] = tensor.to(device, copy=copy)
                found[name] = there[id(tensor)]
    return found


def _called(module: nn.Module, tensors: Named, x: Tensor) -> Tensor:
    """A module's output with these in the place of its own. Torch's own way with tensors of two
    names would leave those of a module of two names in it."""
    out: Tensor = functional_call(module, tensors, (x,), tie_weights=False)
    return out


def _is_on(network: nn.Module, device_type: str) -> bool:
    """Whether the weights are in a device's memory anyway. Those of a CPU are read there."""
    return device_type == "cpu" or all(p.device.type == device_type for p in network.parameters())


def _peak(forward: Forward, shape: Shape, device_type: str) -> int:
    """Bytes on the device at most, counted on fake tensors."""
    home = "cpu" if _is_on(forward.network, device_type) else "meta"
    counted = Forward(skeleton(forward.network), forward.rows, forward.resident)
    with fake_tensors(), Counter() as counter:
        with torch.device(home):
            materialised(counted.network)
        raw = torch.empty((forward.rows, *shape), dtype=torch.uint8)
        counted(raw.float() / 255)
    return counter.peak
