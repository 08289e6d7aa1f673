"""The first weights of a stage."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from greedy.base.seeds import derive
from greedy.models.stages import Stage


@contextmanager
def seeded(seed: int, *keys: int | str) -> Iterator[None]:
    """Inside, torch's CPU generator is at the start of the stream (seed, "weights", keys);
    afterwards it is where it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(seed, "weights", *keys))
        yield


def initialise(stage: Stage, seed: int, *, zero: bool) -> None:
    """Gives a stage built on the meta device its first weights: PyTorch's defaults, drawn from
    a stream of its own. A stage that has weights keeps them.

    ``zero`` is for the output layer, whose weight starts there and its bias at the default, as
    published for all training but plain back-propagation.
    """
    if not any(p.is_meta for p in stage.parameters()):
        return
    stage.to_empty(device="cpu")
    with seeded(seed, stage.number):
        for module in stage.modules():
            if callable(reset := getattr(module, "reset_parameters", None)):
                reset()
    if zero:
        for module in stage.layer:
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.weight)
