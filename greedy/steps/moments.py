"""Adam's moments, made before its first step."""

import torch

from greedy.base.devices import is_out_of_memory
from greedy.base.errors import TrainingError
from greedy.steps.host_adam import HostAdam

ADAMS = (torch.optim.Adam, torch.optim.AdamW, HostAdam)


def make_moments(optimizer: torch.optim.Optimizer, number: int) -> None:
    """Makes the moments of an Adam, zeros, before its first step would make them: memory that runs
    out within a step, after weights have changed, would end the training. Other optimisers are left
    as they are. ``number`` is that of the stage.

    Raises:
        TrainingError: the moments do not fit into memory.
    """
    if type(optimizer) not in ADAMS:
        return
    try:
        for group in optimizer.param_groups:
            steps_on_device = group["fused"] or group["capturable"]
            for parameter in group["params"]:
                if parameter.requires_grad and not optimizer.state.get(parameter):
                    state = _zeros(parameter, group["amsgrad"], steps_on_device)
                    optimizer.state[parameter] = state
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


def _zeros(
    parameter: torch.Tensor, amsgrad: bool, steps_on_device: bool
) -> dict[str, torch.Tensor]:
    """Makes the state of a parameter, its count of steps on its device or on the host."""
    device = parameter.device if steps_on_device else torch.device("cpu")
    names = ["exp_avg", "exp_avg_sq", *(["max_exp_avg_sq"] if amsgrad else [])]
    zeros = {name: torch.zeros_like(parameter) for name in names}
    return {"step": torch.zeros((), device=device), **zeros}
