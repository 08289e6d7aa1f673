"""A network's structure without its weights."""

from copy import deepcopy
from typing import TypeVar

import torch
from torch import nn

Module = TypeVar("Module", bound=nn.Module)


def skeleton(network: Module) -> Module:
    """Returns a copy of a network whose parameters and buffers are on the meta device. It shares
    tensors that are plain attributes."""
    memo: dict[int, object] = {}
    for module in network.modules():
        memo.update((id(value), value) for value in vars(module).values() if torch.is_tensor(value))
    for parameter in network.parameters():
        empty = torch.empty_like(parameter, device="meta")
        memo[id(parameter)] = nn.Parameter(empty, parameter.requires_grad)
    for buffer in network.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    return deepcopy(network, memo)
