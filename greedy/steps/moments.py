"""The moments of Adam and of SGD, made before the first step."""

from typing import Any

import torch

from greedy.base.devices import is_out_of_memory
from greedy.base.errors import TrainingError
from greedy.steps.host_state import HostAdam, HostSGD, OnHost
from greedy.steps.sharded_state import ShardedAdam, ShardedSGD

ADAMS = (torch.optim.Adam, torch.optim.AdamW, HostAdam, ShardedAdam)
SGDS = (torch.optim.SGD, HostSGD, ShardedSGD)


def make_moments(optimizer: torch.optim.Optimizer, number: int) -> None:
    """Makes the moments of an Adam or a fused SGD, zeros, before its first step would make them:
    memory that runs out within a step, after weights have changed, would end the training; and a
    fused SGD whose first step is skipped would go on with a momentum that was never set. Other
    optimisers are left as they are. ``number`` is that of the stage.

    Raises:
        TrainingError: the moments do not fit into memory.
    """
    if type(optimizer) not in (*ADAMS, *SGDS):
        return
    try:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                is_new = parameter.requires_grad and not optimizer.state.get(parameter)
                if is_new and (state := _zeros(type(optimizer), parameter, group)):
                    optimizer.state[parameter] = state
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        optimizer.state.clear()
        way = "free memory on its device, or keep them in main memory with --optimizer-state host"
        if isinstance(optimizer, OnHost):
            way = "free main memory"
        raise TrainingError(
            f"the moments of stage {number}'s optimiser do not fit into memory: {way}"
        ) from error


def _zeros(
    kind: type[torch.optim.Optimizer], parameter: torch.Tensor, group: dict[str, Any]
) -> dict[str, torch.Tensor]:
    """Makes the first state of a parameter of a group, Adam's count of steps on its device or on
    the host. Empty where the optimiser needs none yet."""
    if kind in SGDS:
        keeps = group["fused"] and group["momentum"] and not group["dampening"]
        return {"momentum_buffer": torch.zeros_like(parameter)} if keeps else {}
    on_device = group["fused"] or group["capturable"]
    device = parameter.device if on_device else torch.device("cpu")
    names = ["exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if group["amsgrad"] else [])]
    zeros = {name: torch.zeros_like(parameter) for name in names}
    return {"step": torch.zeros((), device=device), **zeros}
