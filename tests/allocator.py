"""An allocator with little memory, for steps on a CPU."""

from typing import Any

import torch
from torch import Tensor

from greedy.base.sizes import format_size
from greedy.memory.counting import Counter


class Allocator(Counter):
    """Counts tensors, and has a limit that may be changed at any time: beyond it an operator's
    result is released and an error raised, but after the operator has run. If a backward pass fails
    in this way, torch's queue for the CPU keeps the branches that were waiting."""

    limit: int | None = None

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        before, peak = self.live, self.peak
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if self.limit is not None and self.live > max(self.limit, before):
            wanted, self.peak = self.live - before, peak
            del result
            raise torch.OutOfMemoryError(
                f"{format_size(wanted)} more than {format_size(before)} is over the limit"
            )
        return result

    def _made(self, result: Any, given: Any) -> list[Tensor]:
        """Is not asked for what is only counted."""
        return [t for t in super()._made(result, given) if not is_fake(t)]


def is_fake(tensor: Tensor) -> bool:
    return isinstance(tensor, torch._subclasses.FakeTensor)
