"""The processes that train a network together, each on its share of every batch."""

from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Ranks:
    """This process among those that train together. Every one of them calls the methods that
    communicate in the same order.

    Attributes:
        rank: the number of this process, from 0.
        size: the number of processes.
    """

    rank: int = 0
    size: int = 1

    @classmethod
    def joined(cls) -> "Ranks":
        """Returns the place of this process in torch's process group, if there is one."""
        if not (dist.is_available() and dist.is_initialized()):
            return ALONE
        return cls(dist.get_rank(), dist.get_world_size())

    def shares(self, rows: int) -> list[slice]:
        """Returns each process's rows of a batch: nearly equally many, and none for some where a
        batch has fewer rows than there are processes."""
        edges = [rows * rank // self.size for rank in range(self.size + 1)]
        return [slice(start, stop) for start, stop in pairwise(edges)]

    def share(self, rows: int) -> slice:
        """Returns this process's rows of a batch."""
        return self.shares(rows)[self.rank]

    def is_idle(self, rows: int) -> bool:
        """Returns whether a batch has too few rows for this process to have one."""
        share = self.share(rows)
        return share.start == share.stop

    def computed(self, rows: int) -> slice:
        """Returns the rows of a batch that this process computes: its share, or the first row where
        that is empty, since layers take no empty batch. Of that row nothing is gathered."""
        return slice(0, 1) if self.is_idle(rows) else self.share(rows)

    def add(self, tensor: Tensor) -> None:
        """Replaces a tensor by the sum of those of all processes, which is the same in each."""
        if self.size > 1:
            dist.all_reduce(tensor)

    def gather(self, part: Tensor, rows: int) -> Tensor:
        """Returns a tensor with the rows of a batch (rows, ...), of which each process has its
        share as ``part``."""
        if self.size == 1:
            return part
        shares = self.shares(rows)
        most = max(share.stop - share.start for share in shares)
        # The collective needs equally many rows of each.
        padded = part.new_zeros((most, *part.shape[1:]))
        own = self.share(rows)
        padded[: own.stop - own.start] = part[: own.stop - own.start]
        parts = [torch.empty_like(padded) for _ in shares]
        dist.all_gather(parts, padded)
        return torch.cat([p[: s.stop - s.start] for p, s in zip(parts, shares, strict=True)])


ALONE = Ranks()
"""One process that trains by itself."""
