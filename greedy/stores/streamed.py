"""Frozen stages whose weights are in memory only while they compute."""

from pathlib import Path

import torch
from torch import Tensor
from torch.func import functional_call

from greedy.base.devices import preferred_layout
from greedy.base.files import read_tensors
from greedy.models import Stage


class StreamedStage:
    """A frozen stage that reads its weights from their file each time it is called.

    Args:
        stage: the stage, which stays as it is.
        path: the file of its weights, already checked.
        device: where it computes.
    """

    def __init__(self, stage: Stage, path: Path, device: torch.device) -> None:
        self._stage, self._path, self._device = stage.eval(), path, device

    def __call__(self, x: Tensor) -> Tensor:
        """Computes the stage's output for inputs (B, *shape)."""
        tensors = {
            name: tensor.to(self._device) for name, tensor in read_tensors(self._path).items()
        }
        if self._stage.any_layout:
            tensors = {name: preferred_layout(tensor) for name, tensor in tensors.items()}
        output: Tensor = functional_call(self._stage, tensors, (x,), tie_weights=False)
        return output
