"""Adam's moments, made before its first step."""

import torch

from greedy.base.devices import is_out_of_memory
from greedy.base.errors import TrainingError
from greedy.steps.host_adam import HostAdam

ADAMS = (torch.optim.Adam, torch.optim.AdamW, HostAdam)


def make_moments(optimizer: torch.optim.Optimizer, number: int) -> None:
    """Gives the Adam of stage ``number`` the moments that it would make in its first step, the same
    zeros: once a step has begun to change weights there is no way back, before it a smaller memory
    mode can still be tried. Other optimisers make what they need as they go.

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
    """The state of a parameter, its steps counted on its device or on the host."""
    device = parameter.device if counted_there else torch.device("cpu")
    names = ["exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if amsgrad else [])]
    zeros = {name: torch.zeros_like(parameter) for name in names}
    return {"step": torch.zeros((), device=device), **zeros}
