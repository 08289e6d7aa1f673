"""The machine of a forecast: its devices, and the settings that depend on them."""

from dataclasses import dataclass

import torch

from greedy.base.devices import pick_device, pick_precision, pick_refresh_device
from greedy.memory.choice import memory_budget
from greedy.memory.drawing import DrawingDevice
from greedy.recipes import Recipe


@dataclass(frozen=True)
class Machine:
    """The device that a run computes on, and the settings that depend on it.

    Attributes:
        device: ``cpu``, ``cuda`` or ``mps``.
        precision: ``float32``, ``bfloat16`` or ``float16``.
        memory_budget_bytes: bytes that a step may take on the device; ``None`` for any number.
        optimizer_state: where the optimiser's moments are: ``device``, ``host`` or ``sharded``.
        processes: the number of processes that train together on it; memory is that of each.
        drawing: the device that draws views beside the steps; ``None`` if they take turns.
    """

    device: str
    precision: str
    memory_budget_bytes: int | None
    optimizer_state: str
    processes: int = 1
    drawing: DrawingDevice | None = None


def machine(
    recipe: Recipe, device: str, refresh_device: str | None = None, processes: int = 1
) -> Machine:
    """Returns the machine for the values of ``--device``, ``--refresh-device`` and
    ``--processes``. GPUs need not be there: without them an automatic precision is float32, and
    automatic memory budgets are ``None``."""
    without_gpu = not torch.cuda.is_available()
    absent = device == "cuda" and without_gpu
    place = torch.device(device) if absent else pick_device(device)
    drawing, other = None, pick_refresh_device(refresh_device, place, absent=without_gpu)
    if other is not None:
        no_gpu = other.type == "cuda" and without_gpu
        drawing = DrawingDevice.of(other, place.type, recipe, absent=no_gpu)
    precision, automatic = recipe.training.precision, recipe.memory.budget == "auto"
    budget = None if absent and automatic else memory_budget(recipe, place, processes)
    return Machine(
        device=place.type,
        precision="float32" if absent and precision == "auto" else pick_precision(precision, place),
        memory_budget_bytes=budget,
        optimizer_state=recipe.memory.optimizer_state,
        processes=processes,
        drawing=drawing,
    )
