"""The device that draws new views beside the one that trains."""

from dataclasses import dataclass
from typing import Self

import torch

from greedy.base.errors import UserError
from greedy.base.sizes import format_size
from greedy.memory.choice import memory_budget, named_budget, reserved, usable
from greedy.recipes import Recipe


@dataclass(frozen=True)
class DrawingDevice:
    """A device that draws views beside the steps of a stage.

    Attributes:
        name: of the device, such as ``cuda:1``.
        budget: bytes that drawing may take there, those of its allocator included; ``None`` for any
            number.
        apart: whether it has a memory of its own, which is not that of the device that trains.
    """

    name: str
    budget: int | None
    apart: bool

    @classmethod
    def of(
        cls, device: torch.device, training_type: str, recipe: Recipe, *, absent: bool = False
    ) -> Self:
        """Returns a device with the budget that the recipe names, which then holds on each device,
        or else a share of its free memory, unless it is ``absent``."""
        budget = named_budget(recipe) if absent else memory_budget(recipe, device)
        return cls(str(device), budget, apart=device.type != "cpu" or training_type != "cpu")

    @property
    def type(self) -> str:
        """The type of the device: ``cpu``, ``cuda`` or ``mps``."""
        return self.name.partition(":")[0]

    @property
    def usable(self) -> int | None:
        """The bytes that tensors may take; ``None`` for any number."""
        return None if self.budget is None else usable(self.budget, self.type)

    def taken(self, counted: int, stage: str) -> int:
        """Returns the bytes that drawing views of a stage's store takes on a device with a memory
        of its own, ``counted`` for its tensors. Raises ``UserError`` if they do not fit."""
        bytes_taken = reserved(counted, self.type)
        if self.budget is not None and bytes_taken > self.budget:
            raise UserError(
                f"drawing views of {stage} takes at least {format_size(bytes_taken)} on "
                f"{self.name} and its memory budget is {format_size(self.budget)}: raise "
                f"--memory-budget, or leave out --refresh-device"
            )
        return bytes_taken
