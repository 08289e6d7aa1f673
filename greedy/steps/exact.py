"""The gradients of a whole batch with only a micro-batch of activations in memory.

Within a batch only two things couple samples: the batch's mean and variance, and the loss, which
sees z and p. Between them all is per sample and may be computed a micro-batch at a time. Notation
of docs/exact-step.md: c is the encoder's output, mu and v its mean and biased variance over the
batch, h the activation of normalised c; g is dL/dc with mu and v held fixed.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from greedy.base.ranks import Shares
from greedy.exact.rows import write_rows
from greedy.exact.statistics import Statistics
from greedy.losses import Features, LocalLoss
from greedy.models.lean import Layer, add_weight_gradient, forward
from greedy.runs.choices import Mode
from greedy.steps.parts import SingleLayer
from greedy.steps.scaling import LossScale
from greedy.steps.shared import add_gradients, gathered, own_rows

SHARE = 2**-8  # a power of two, so that no digit changes


@dataclass
class ExactStep:
    """The gradients of one batch, computed in passes over micro-batches that share only small
    tensors.

    Attributes:
        parts: encoder, batch norm, activation and heads of the stage.
        loss: the local loss of the stage.
        mode: the memory mode, any but ``plain``.
        slices: the rows of each micro-batch.
        x: the stage's input (B, ...), in host memory if the mode streams it.
        autocast: the precision of encoder and heads.
        scale: the factor on the loss, and so on all gradients; ``None`` for 1.
        shares: of the processes that compute the batch, where x and slices are of the rows of this
            one; ``None`` for one alone.
        c: the encoder's output (B, ...), if the mode keeps it.
        g: its gradient with the statistics held fixed (B, ...), if the mode keeps it.
    """

    parts: SingleLayer
    loss: LocalLoss
    mode: Mode
    slices: Sequence[slice]
    x: Tensor
    autocast: torch.autocast
    scale: LossScale | None = None
    shares: Shares | None = None
    c: Tensor | None = field(default=None, init=False)
    g: Tensor | None = field(default=None, init=False)

    @torch.no_grad()
    def gradients(self, y: Tensor) -> tuple[Tensor, Tensor | None]:
        """Puts the gradients of the batch's loss into every parameter's ``grad``.

        Args:
            y: the targets of the loss, a row for each sample.

        Returns:
            The loss, a scalar, and the logits (B, classes), ``None`` without a local classifier.
        """
        clear_gradients(self.parts.parameters())
        with self.autocast:  # which casts a weight once for all micro-batches
            statistics = self._statistics()
            features = gathered(self._features(statistics), self.shares)
        loss, slopes = differentiate(self.loss, features, y, self.scale)
        with self.autocast:
            sums = self._backward(statistics, own_rows(slopes, self.shares))
            self._close(statistics, sums)
        add_gradients(self.parts.parameters(), self.shares)
        return loss, self.parts.heads.logits(features)

    def _input(self, rows: slice) -> Tensor:
        x = self.x[rows]
        if not self.mode.streams:
            return x
        device = self.parts.encoder.weight.device
        return x.to(device, non_blocking=device.type == "cuda", copy=True)  # from pinned memory

    def _encoded(self, rows: slice) -> Tensor:
        if self.c is not None:
            return self.c[rows]
        return forward(self.parts.encoder, self._input(rows))

    def _statistics(self) -> Statistics | None:
        """Computes the batch's statistics, updates the running ones, and keeps c if the mode does:
        the first pass."""
        statistics, whole_c = None, None
        for rows in self.slices:
            c = self._encoded(rows)
            if self.mode.keeps_c:
                whole_c = write_rows(whole_c, len(self.x), rows, c)
            if self.parts.norm is not None:
                part = Statistics.of(c)
                statistics = statistics.merged(part) if statistics else part
        self.c = whole_c
        if statistics is None or self.parts.norm is None:
            return None
        if self.shares:
            statistics = statistics.shared(self.shares)
        statistics.update_running(self.parts.norm)
        return statistics.to(self.parts.norm.weight.dtype)

    def _features(self, statistics: Statistics | None) -> Features:
        """Computes z and p of the whole batch without gradient: the second pass."""
        whole: list[Any] = [None, None]
        for rows in self.slices:
            features = self.parts.heads(self.parts.hidden(self._encoded(rows), statistics))
            whole = [
                None if part is None else write_rows(place, len(self.x), rows, part)
                for place, part in zip(whole, features, strict=True)
            ]
        return Features(*whole)

    def _backward(self, statistics: Statistics | None, slopes: Features) -> "ResidueSums | None":
        """Computes the gradients of heads and batch norm, and g, which is kept or else added to the
        encoder's gradients: the third pass."""
        sums = None
        if statistics is not None and not self.mode.keeps_c:
            sums = ResidueSums.of(self.parts.encoder.weight)
        for rows in self.slices:
            c = self._encoded(rows)
            g = self._slope(c, statistics, slopes, rows)
            if self.mode.keeps_gradient:
                self.g = write_rows(self.g, len(self.x), rows, g)
                continue
            x = self._input(rows)
            self._add_to_encoder(x, g)
            if sums is not None and statistics is not None:
                sums.add(self.parts.encoder, x, c - along(statistics.mean, c))
        return sums

    def _slope(
        self, c: Tensor, statistics: Statistics | None, slopes: Features, rows: slice
    ) -> Tensor:
        leaf = c.detach().requires_grad_()
        with torch.enable_grad():
            features = self.parts.heads(self.parts.hidden(leaf, statistics))
        pairs = [
            (f, s[rows])
            for f, s in zip(features, slopes, strict=True)
            if f is not None and s is not None  # the loss may take one of them alone
        ]
        # Within autocast the thread of autograd may compute in float16 in any precision.
        with torch.autocast(c.device.type, enabled=False):
            torch.autograd.backward([f for f, _ in pairs], [s for _, s in pairs])
        assert leaf.grad is not None
        return leaf.grad

    def _close(self, statistics: Statistics | None, sums: "ResidueSums | None") -> None:
        """Adds what the encoder's gradients lack: the last pass."""
        residue = None
        if statistics is not None and self.parts.norm is not None:
            residue = Residue.of(statistics, self.parts.norm, self.shares)
        if sums is not None and residue is not None:
            sums.close(self.parts.encoder, residue)
            return
        for rows in self.slices:
            missing = None if self.g is None else self.g[rows]
            if residue is not None and self.c is not None:
                r = residue(self.c[rows])
                missing = r if missing is None else r.add_(missing)
            if missing is not None:
                self._add_to_encoder(self._input(rows), missing)

    def _add_to_encoder(self, x: Tensor, g: Tensor) -> None:
        encoder = self.parts.encoder
        assert encoder.weight.grad is not None
        add_weight_gradient(encoder, x, g.to(x.dtype), encoder.weight.grad)
        # Batch norm takes a bias away again: what would add up to its gradient is rounding.
        if self.parts.norm is None and encoder.bias is not None:
            assert encoder.bias.grad is not None
            others = range(g.dim() - 1) if isinstance(encoder, nn.Linear) else per_channel(g)
            encoder.bias.grad += g.sum(tuple(others), dtype=encoder.bias.dtype)


@dataclass(frozen=True)
class Residue:
    """r = dL/dc - g, the gradient that reaches c through mu and v: a + b (c - mu), where a, b and
    mu have one number for each channel."""

    mean: Tensor
    a: Tensor
    b: Tensor

    @classmethod
    def of(
        cls,
        statistics: Statistics,
        norm: nn.BatchNorm1d | nn.BatchNorm2d,
        shares: Shares | None = None,
    ) -> "Residue":
        """Computes the residue from the gradients of gamma and beta."""
        assert norm.weight.grad is not None and norm.bias.grad is not None
        sums = torch.stack([norm.weight.grad, norm.bias.grad])
        if shares:
            shares.ranks.add(sums)
        d_gamma, d_beta = sums
        variance = statistics.variance + norm.eps
        d_mean = -norm.weight * d_beta * variance.rsqrt()
        d_variance = -norm.weight * d_gamma / (2 * variance)
        n = statistics.count
        return cls(statistics.mean, d_mean / n, 2 * d_variance / n)

    def __call__(self, c: Tensor) -> Tensor:
        """Returns r of a micro-batch (m, C, ...), in the precision of the parameters."""
        return (c - along(self.mean, c)).mul_(along(self.b, c)).add_(along(self.a, c))


@dataclass(frozen=True)
class ResidueSums:
    """Weight gradients from which r's part is computed if c is not kept. Both are scaled by
    ``SHARE``, so that their sums over a micro-batch fit float16.

    Attributes:
        ones: the weight gradient if dL/dc were 1 everywhere, the same for all output channels.
        centred: the weight gradient if dL/dc were c - mu.
    """

    ones: Tensor
    centred: Tensor

    @classmethod
    def of(cls, weight: Tensor) -> "ResidueSums":
        """Returns sums of zero for a weight."""
        return cls(torch.zeros_like(weight[:1]), torch.zeros_like(weight))

    def add(self, encoder: Layer, x: Tensor, centred: Tensor) -> None:
        """Adds a micro-batch with its input and its c - mu, ``centred``, which is overwritten."""
        add_weight_gradient(encoder, x, centred.mul_(SHARE).to(x.dtype), self.centred)
        ones = torch.full_like(centred[:, :1], SHARE, dtype=x.dtype)
        add_weight_gradient(encoder, x, ones, self.ones)

    def close(self, encoder: Layer, residue: Residue) -> None:
        """Adds r's part to the encoder's gradients."""
        weight = encoder.weight
        assert weight.grad is not None
        a, b = (v.reshape(-1, *[1] * (weight.dim() - 1)) / SHARE for v in (residue.a, residue.b))
        weight.grad.addcmul_(self.ones, a).addcmul_(self.centred, b)


def differentiate(
    loss: LocalLoss, features: Features, y: Tensor, scale: LossScale | None = None
) -> tuple[Tensor, Features]:
    """Computes the loss of a batch, a scalar, and its gradients with respect to z and p. The
    gradients are scaled, the loss is not."""
    with torch.enable_grad():
        leaves = Features(*(f if f is None else f.requires_grad_() for f in features))
        value = loss(leaves, y)
        (value if scale is None else scale(value)).backward()
    slopes: Any = [f if f is None else f.grad for f in leaves]
    return value.detach(), Features(*slopes)


def clear_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Sets all gradients to zero, in the memory of the last step's gradients."""
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        else:
            parameter.grad.zero_()


def per_channel(values: Tensor) -> list[int]:
    """Returns the dimensions over which a channel's values are summed."""
    return [d for d in range(values.dim()) if d != 1]


def along(channels: Tensor, like: Tensor) -> Tensor:
    """Reshapes (C,) so that it broadcasts over ``like``, (B, C, ...)."""
    return channels.reshape(1, -1, *[1] * (like.dim() - 2))
