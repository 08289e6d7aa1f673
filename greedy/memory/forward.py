"""The forward pass of a trained network within a memory budget."""

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
from greedy.memory.fake import fake_tensors, materialise
from greedy.models import Shape
from greedy.models.skeleton import skeleton

LARGEST_BATCH = 256

Named = dict[str, Tensor]


@dataclass
class Forward:
    """The forward pass of a network in evaluation mode, without gradients. The network itself is
    neither changed nor moved.

    Attributes:
        network: the network.
        rows: images to compute at a time, for the caller.
        resident: whether copies of all weights stay on the inputs' device, as long as this object
            exists; otherwise each module's are copied when it computes.
    """

    network: nn.Sequential
    rows: int
    resident: bool
    _resident_tensors: Named | None = field(default=None, init=False, repr=False)

    @torch.no_grad()  # and not in inference mode, whose tensors a module could keep
    def __call__(self, x: Tensor) -> Tensor:
        """Computes the network's output for inputs (B, C, H, W) on a device."""
        with _evaluation_mode(self.network):
            if self.resident:
                if self._resident_tensors is None:
                    self._resident_tensors = _tensors_on(self.network, x.device)
                return _call_with(self.network, self._resident_tensors, x)
            for module in self.network:
                x = _call_with(module, _tensors_on(module, x.device), x)
            return x


def fit_forward(network: nn.Sequential, shape: Shape, budget: int, device_type: str) -> Forward:
    """Returns the forward pass that fits a memory budget with the largest batch. All weights are on
    the device if that leaves room for a row, or if they are there already.

    Args:
        shape: (C, H, W) of a raw image.
        budget: bytes on the device.
        device_type: ``cpu``, ``cuda`` or ``mps``.

    Raises:
        UserError: not even one row fits.
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
def _evaluation_mode(network: nn.Module) -> Iterator[None]:
    """Puts a network into evaluation mode inside the ``with``. Only the modules' flags are set,
    since a module's ``train`` may do more than that."""
    flags = [(module, module.training) for module in network.modules()]
    try:
        for module, _ in flags:
            module.training = False
        yield
    finally:
        for module, flag in flags:
            module.training = flag


def _tensors_on(module: nn.Module, device: torch.device) -> Named:
    """Returns a module's parameters and buffers on a device, by name; submodules with two names
    have only the first. A tensor with two names stays one tensor. Parameters on the device are not
    copied; buffers always are, since a module may write to them."""
    tensors: Named = {}
    on_device: dict[int, Tensor] = {}
    for prefix, submodule in module.named_modules():
        for copy, named in ((False, submodule.named_parameters), (True, submodule.named_buffers)):
            for name, tensor in named(prefix, recurse=False, remove_duplicate=False):
                if id(tensor) not in on_device:
                    on_device[id(tensor)] = tensor.to(device, copy=copy)
                tensors[name] = on_device[id(tensor)]
    return tensors


def _call_with(module: nn.Module, tensors: Named, x: Tensor) -> Tensor:
    """Returns a module's output with other parameters and buffers. ``tie_weights`` is off, since it
    would leave the tensors of a submodule with two names in the module."""
    out: Tensor = functional_call(module, tensors, (x,), tie_weights=False)
    return out


def _is_on(network: nn.Module, device_type: str) -> bool:
    """Returns whether the weights are in a device's memory already. A CPU reads them where they
    are."""
    return device_type == "cpu" or all(p.device.type == device_type for p in network.parameters())


def _peak(forward: Forward, shape: Shape, device_type: str) -> int:
    """Counts the most bytes on the device during the forward pass, on fake tensors."""
    home = "cpu" if _is_on(forward.network, device_type) else "meta"
    fake = Forward(skeleton(forward.network), forward.rows, forward.resident)
    with fake_tensors(), Counter() as counter:
        with torch.device(home):
            materialise(fake.network)
        raw = torch.empty((forward.rows, *shape), dtype=torch.uint8)
        fake(raw.float() / 255)
    return counter.peak
