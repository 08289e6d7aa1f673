"""The initial weights of a stage."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from greedy.base.seeds import derive_seed, seeded_globally
from greedy.models.stages import Stage


@contextmanager
def seeded(seed: int, *keys: int | str) -> Iterator[None]:
    """Seeds the global generators with the stream (seed, "weights", keys) inside the block and
    restores them afterwards."""
    with seeded_globally(derive_seed(seed, "weights", *keys)):
        yield


def initialise(stage: Stage, seed: int, *, zero: bool) -> None:
    """Draws the initial weights of a stage built on the meta device: PyTorch's defaults, from the
    stage's stream. A stage that has weights keeps them.

    ``zero`` sets the weight of the output layer to 0, its bias at the default, as published for all
    training but plain back-propagation.
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
