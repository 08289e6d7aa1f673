"""The memory format of feature maps and of convolutions' weights."""

from typing import TypeVar

import torch
from torch import Tensor, nn

from greedy.base.devices import preferred_layout
from greedy.base.torch_private import has_hooks

Module = TypeVar("Module", bound=nn.Module)
# Packages whose modules take maps in any layout (all of torchvision's networks and 193 of timm's
# were tried), and what their classes are derived from.
KNOWN = {"greedy", "torch", "torchvision", "timm", "builtins", "typing", "abc", "collections"}
CODE = (torch.fx.GraphModule, torch.jit.ScriptModule)  # torch's classes for the code of others


def takes_any_layout(module: nn.Module) -> bool:
    """Returns whether a module takes feature maps in any memory format. Modules of others may look
    at it, as ``x.view(len(x), -1)`` does, which fails for channels-last maps."""
    return all(map(_takes_any_layout, module.modules()))


def _takes_any_layout(module: nn.Module) -> bool:
    packages = {kind.__module__.split(".")[0] for kind in type(module).__mro__}
    return packages <= KNOWN and not isinstance(module, CODE) and not has_hooks(module)


def usual_layout(values: Tensor) -> Tensor:
    """Returns feature maps in torch's usual memory format where their device prefers another, see
    ``preferred_layout``."""
    return values.contiguous() if values.is_cuda and values.dim() == 4 else values


def placed(module: Module, device: torch.device) -> Module:
    """Moves a module to a device, with its convolutions' weights in the layout that is fastest
    there if it takes maps in any."""
    module.to(device)
    if takes_any_layout(module):
        for parameter in module.parameters():
            parameter.data = preferred_layout(parameter.data)
    return module
