"""Adam's moments, made before its first step."""

import torch

from greedy.base.devices import is_out_of_memory
from greedy.base.errors import TrainingError
from greedy.steps.host_adam import HostAdam

ADAMS = (torch.optim.Adam, torch.optim.AdamW, HostAdam)


def make_moments(optimizer: torch.optim.Optimizer, number: int) -> None:
    """Makes the moments of an Adam before its first step, with the zeros it would begin with. Once
    a step has begun to change weights it cannot be repeated with less memory; before, it can. Other
    optimisers make their state as they go.

    Raises TrainingError where memory does not suffice.
    """
    if type(optimizer) not in ADAMS:
        return
    try:
        for group in optimizer.param_groups:
            counted_there = group["fused"] or group["capturable"]
            for parameter in group["params"]:
                if parameter.requires_grad and not optimizer.state.get(parameter):
                    optimizer.state[parameter] = _zeros(parameter, group["amsgrad"], counted_there)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        optimizer.state.clear()
        way = "free memory on its device, or keep them in main memory with --optimizer-state host"
        if isinstance(optimizer, HostAdam):
            way = "free main memory"
        raise TrainingError(
            f"the moments of stage {number}'s optimiser do not fit into memory: {way}"
        ) from error


def _zeros(parameter: torch.Tensor, amsgrad: bool, counted_there: bool) -> dict[str, torch.Tensor]:
    """Makes the state of a parameter, its step count on its device or on the host."""
    device = parameter.device if counted_there else torch.device("cpu")
    names = ["exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if amsgrad else [])]
    zeros = {name: torch.zeros_like(parameter) for name in names}
    return {"step": torch.zeros((), device=device), **zeros}
