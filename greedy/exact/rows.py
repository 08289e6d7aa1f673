"""Rows of a batch, in one tensor or in several within tuples, lists and dictionaries."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from greedy.base.errors import UserError
from greedy.base.torch_private import tree_leaves, tree_map


def tensors_in(tree: Any) -> list[Tensor]:
    """Returns the tensors of a tree in order."""
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def each_tensor(function: Callable[..., Any], tree: Any, *others: Any) -> Any:
    """Returns a tree with ``function`` applied to each tensor, and to what stands in its place in
    other trees; all else stays as it is."""

    def apply(leaf: Any, *more: Any) -> Any:
        return function(leaf, *more) if isinstance(leaf, Tensor) else leaf

    return tree_map(apply, tree, *others)


def row_count(tree: Any, what: str) -> int:
    """Returns the number of rows that all tensors of a tree have.

    Raises:
        UserError: there is no tensor, or they have not equally many rows; ``what`` names them.
    """
    counts = {len(t) if t.dim() else 0 for t in tensors_in(tree)}
    if len(counts) != 1 or 0 in counts:
        found = " and ".join(map(str, sorted(counts))) or "no"
        raise UserError(
            f"{what} have {found} rows: every tensor needs a row for each sample, and the same "
            f"number of them"
        )
    return counts.pop()


class KeptRows:
    """Tensors of micro-batches, by their numbers.

    Args:
        others: rows of the batch that belong to no micro-batch, as in a trial of the memory that
            computes few of them: their memory is taken and not used.
    """

    def __init__(self, others: int = 0) -> None:
        self.others = others
        self._kept: dict[int, Tensor] = {}
        self._unused: Tensor | None = None

    def __getitem__(self, number: int) -> Tensor | None:
        return self._kept.get(number)

    def __setitem__(self, number: int, part: Tensor) -> None:
        if self._unused is None and self.others:
            self._unused = part.new_empty((self.others, *part.shape[1:]))
        self._kept[number] = part

    def pop(self, number: int) -> Tensor | None:
        """Returns what is kept of a micro-batch, and frees it here; ``None`` if nothing is."""
        self._unused = None
        return self._kept.pop(number, None)


def write_rows(
    whole: Tensor | None, count: int, rows: slice, part: Tensor, *, pinned: bool = False
) -> Tensor:
    """Writes a part into its rows of a tensor of ``count`` rows and returns that tensor. If
    ``whole`` is ``None``, the tensor is made, in the layout of the part."""
    if whole is None:
        whole = torch.empty(
            (count, *part.shape[1:]),
            dtype=part.dtype,
            device=part.device,
            memory_format=_layout(part),
            pin_memory=pinned,
        )
    whole[rows] = part
    return whole


def _layout(part: Tensor) -> torch.memory_format:
    last = part.dim() == 4 and part.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last and not part.is_contiguous() else torch.contiguous_format
