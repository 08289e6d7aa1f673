"""Mixing of training rows and of their labels: mixup (Zhang et al., 2018) and manifold mixup (Verma
et al., 2019)."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from greedy.base.devices import to_device
from greedy.base.seeds import numpy_generator

Table = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Mixture:
    """The mixing of each row of a batch with the next one, and of the last with the first.

    Attributes:
        shares: of the row itself, (B,), at least 1/2: its own label is the stronger one.
        depth: where in the network rows are mixed: 0 for its input, up to 1, not included, for its
            middle.
    """

    shares: Tensor
    depth: float = 0.0

    def stage(self, stages: int) -> int:
        """Returns the index of the stage of a network, of ``stages`` stages, whose inputs are
        mixed."""
        return int(self.depth * (stages // 2 + 1))

    def whole(self, values: Tensor) -> Tensor:
        """Returns the values (B, ...) of a batch, mixed."""
        return self.part(values, torch.cat((values[1:], values[:1])), slice(None))

    def part(self, values: Tensor, following: Tensor, rows: slice) -> Tensor:
        """Returns the values (rows, ...) of a slice of the batch, mixed with those that follow
        each, which are overwritten."""
        shares = self.shares[rows].to(values.dtype)
        return following.lerp_(values, shares.view(-1, *[1] * (values.dim() - 1)))


@dataclass(frozen=True)
class Mixup:
    """How rows are mixed while a stage or a network trains.

    Attributes:
        alpha: of the distribution Beta(alpha, alpha) of the shares.
        manifold: whether the input of a random stage in the first half of the network is mixed, and
            not always that of the first.
    """

    alpha: float
    manifold: bool = False

    def draw(self, rows: int, seed: int, *key: int | str) -> Table:
        """Draws for all rows of an epoch that ``key`` names. Returns a table (rows, 2) of shares
        and depths. Of two mixed rows each is the stronger in turn, so a share below 1/2 is counted
        from the other."""
        generator = numpy_generator(seed, "mixup", *key)
        shares = generator.beta(self.alpha, self.alpha, rows)
        depths = generator.random(rows) if self.manifold else np.zeros(rows)
        return np.stack((np.maximum(shares, 1 - shares), depths), axis=1)

    @staticmethod
    def mixture(table: Table, rows: Table, device: torch.device) -> Mixture:
        """Returns the mixture of a batch of row numbers, at the depth drawn for its first row."""
        shares = to_device(table[rows, 0].astype(np.float32), device)
        return Mixture(shares, float(table[rows[0], 1]))
