"""The optimisers that a recipe can name."""

from collections.abc import Callable, Iterable, Sequence
from collections.abc import Set as AbstractSet
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from greedy.base.ranks import ALONE, Ranks
from greedy.recipes import Training
from greedy.steps.host_state import HostAdam, HostSGD
from greedy.steps.sharded_state import ShardedAdam, ShardedSGD

NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


def make_optimizer(
    training: Training,
    parameters: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
    rate: float = 1e-3,
    *,
    on_host: bool = False,
    sharers: Ranks = ALONE,
) -> torch.optim.Optimizer:
    """Makes the optimiser that a recipe names.

    Args:
        training: the recipe's section.
        parameters: parameters, or groups of them.
        rate: the learning rate.
        on_host: whether its state is in host memory.
        sharers: the processes that its state is divided over.
    """
    settings: dict[str, Any] = {"lr": rate, "weight_decay": training.weight_decay}
    if training.optimizer == "sgd":
        settings |= {"momentum": training.momentum, "nesterov": training.nesterov}
        if on_host:
            return HostSGD(parameters, **settings)
        if sharers.size > 1:
            return ShardedSGD(parameters, sharers, **settings)
        return torch.optim.SGD(parameters, **settings, fused=True)
    settings["decoupled_weight_decay"] = training.optimizer == "adamw"
    if on_host:
        return HostAdam(parameters, **settings)
    if sharers.size > 1:
        return ShardedAdam(parameters, sharers, **settings)
    return torch.optim.Adam(parameters, **settings, fused=True)


def factory(
    training: Training, sharers: Ranks = ALONE
) -> Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]:
    """Returns a function that makes the optimiser that a recipe names of some parameters."""
    return partial(make_optimizer, training, sharers=sharers)


def undecayed(modules: Iterable[nn.Module]) -> set[nn.Parameter]:
    """Returns the parameters of the modules that weight decay leaves alone: biases, those of norms,
    and all others with one number a channel."""
    return {
        parameter
        for module in modules
        for part in module.modules()
        for name, parameter in part.named_parameters(recurse=False)
        if isinstance(part, NORMS) or "bias" in name or parameter.dim() <= 1
    }


def decay_groups(
    parameters: Sequence[nn.Parameter], without_decay: AbstractSet[nn.Parameter]
) -> list[dict[str, Any]]:
    """Returns the parameters in two groups, or in one if the other would be empty: those that
    weight decay applies to, and those that it does not."""
    decayed = [p for p in parameters if p not in without_decay]
    others = [p for p in parameters if p in without_decay]
    groups: list[dict[str, Any]] = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]
