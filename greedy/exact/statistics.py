"""The mean and variance of a batch, computed a micro-batch at a time."""

from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor, nn

from greedy.base.errors import UserError
from greedy.base.precision import widened
from greedy.base.ranks import Shares
from greedy.base.torch_private import FakeTensor


@dataclass
class Statistics:
    """Mean and biased variance of each channel over ``count`` values. They are merged by Chan's
    formula in float64, since sums of squares would cancel.

    Attributes:
        count: number of values of each channel.
        mean: (C,), their mean.
        variance: (C,), their biased variance.
    """

    count: int
    mean: Tensor
    variance: Tensor

    @classmethod
    def of(cls, c: Tensor) -> "Statistics":
        """Computes the statistics of a micro-batch (m, C, ...), in float32."""
        dims = [d for d in range(c.dim()) if d != 1]
        variance, mean = torch.var_mean(widened(c), dims, correction=0)
        wide = torch.float32 if c.device.type == "mps" else torch.float64
        return cls(c.numel() // c.shape[1], mean.to(wide), variance.to(wide))

    def merged(self, other: "Statistics") -> "Statistics":
        """Returns the statistics of the values of both."""
        count = self.count + other.count
        share = other.count / count
        shift = other.mean - self.mean
        within = (1 - share) * self.variance + share * other.variance
        return Statistics(
            count,
            self.mean + share * shift,
            within + share * (1 - share) * shift.square(),
        )

    def require_variance(self) -> None:
        """Raises ``UserError`` for a single value of each channel."""
        if self.count < 2:
            raise UserError(
                "batch norm has one value for each channel of the batch, which has no variance: "
                "give more samples"
            )

    def shared(self, shares: Shares) -> "Statistics":
        """Returns the statistics of a whole batch, given those of the rows that this process
        computes."""
        if isinstance(self.mean, FakeTensor):  # whose counts are not known
            return self
        counts = torch.full_like(self.mean, 0 if shares.is_idle else self.count)
        parts = shares.ranks.stack(torch.stack([counts, self.mean, self.variance]))
        known = [Statistics(int(count[0]), mean, variance) for count, mean, variance in parts]
        return reduce(Statistics.merged, [part for part in known if part.count])

    def to(self, dtype: torch.dtype) -> "Statistics":
        """Returns the statistics in another precision."""
        return Statistics(self.count, self.mean.to(dtype), self.variance.to(dtype))

    @torch.no_grad()
    def update_running(self, norm: nn.BatchNorm1d | nn.BatchNorm2d) -> None:
        """Updates the running statistics of a batch norm as its forward pass would; for a momentum
        of ``None`` they are the mean over all batches."""
        assert norm.running_mean is not None and norm.running_var is not None
        assert norm.num_batches_tracked is not None
        norm.num_batches_tracked += 1
        weight = norm.momentum if norm.momentum is not None else 1 / norm.num_batches_tracked
        self.move(norm.running_mean, norm.running_var, weight)

    @torch.no_grad()
    def move(self, mean: Tensor, variance: Tensor, weight: float | Tensor) -> None:
        """Moves running statistics towards these, with the unbiased variance."""
        unbiased = self.variance * (self.count / max(self.count - 1, 1))
        for running, value in ((mean, self.mean), (variance, unbiased)):
            running.lerp_(value.to(running.dtype), weight)
