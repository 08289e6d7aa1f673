"""The first weights of a stage."""

import torch
from torch import nn

from greedy.models.stages import Stage
from greedy.seeds import derive


def initialise(stage: Stage, seed: int, *, device: torch.device, is_output: bool) -> None:
    """Gives a stage built on the meta device its first weights, PyTorch's defaults drawn from
    the stream (seed, "weights", stage); a stage that has weights keeps them.

    The output layer's weight starts at zero, its bias at the default, as published. One stage
    is materialised at a time, so no network is ever whole in memory.
    """
    if any(p.is_meta for p in stage.parameters()):
        materialise(stage, derive(seed, "weights", stage.number))
        if is_output:
            (encoder,) = (m for m in stage.layer if isinstance(m, nn.Linear))
            nn.init.zeros_(encoder.weight)
    stage.to(device)


def materialise(module: nn.Module, seed: int) -> None:
    """Replaces meta parameters by real ones on the CPU with each module's own default
    initialisation, drawn from ``seed`` without touching the global generator."""
    module.to_empty(device="cpu")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for child in module.modules():
            if callable(reset := getattr(child, "reset_parameters", None)):
                reset()
