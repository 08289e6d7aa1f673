"""Forward and backward passes of a batch whose rows are divided over processes.

Samples meet only in batch norms and in the loss, which sees the heads' features. Where they meet,
small tensors are exchanged, so that the gradients are those of the whole batch:

- a batch norm's statistics are merged over the processes, and so are, in the backward pass, the two
  sums by which its input's gradient depends on other samples (see ``greedy.exact.norms``);
- the features of the whole batch are gathered, and every process computes the loss of all of them.
  What a process gets back are the slopes of its own rows;
- each process then has the part of every parameter's gradient that comes from its rows; they are
  added up.
"""

from collections.abc import Callable, Iterable
from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from greedy.base.ranks import Ranks, Shares
from greedy.exact.norms import Call
from greedy.exact.statistics import Statistics
from greedy.losses import Features


class SharedNorms(TorchFunctionMode):
    """A context in which batch norms in training normalise by the statistics of a whole batch, of
    which this process computes its share."""

    def __init__(self, shares: Shares) -> None:
        super().__init__()
        self._shares = shares

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.batch_norm and (call := Call(*args, **kwargs)).training:
            return shared_norm(call, self._shares)
        return func(*args, **kwargs)


def shared_norm(call: Call, shares: Shares) -> Tensor:
    """Computes a batch norm of this process's rows by the statistics of all rows, and updates its
    running statistics."""
    statistics = shared_statistics(Statistics.of(call.input.detach()), shares)
    if call.running_mean is not None and call.running_var is not None:
        statistics.move(call.running_mean, call.running_var, call.momentum)
    like = next((t for t in call[1:4] if t is not None), call.input)
    known = statistics.to(like.dtype)
    out: Tensor = _Normalise.apply(*call[:1], *call[3:5], known, shares, call.eps)
    return out


def shared_statistics(own: Statistics, shares: Shares) -> Statistics:
    """Returns the statistics of a batch, given those of the rows that this process computes."""
    counts = torch.full_like(own.mean, 0 if shares.is_idle else own.count)
    parts = shares.ranks.stack(torch.stack([counts, own.mean, own.variance]))
    known = [Statistics(int(count[0]), mean, variance) for count, mean, variance in parts]
    return reduce(Statistics.merged, [part for part in known if part.count])


class _Normalise(torch.autograd.Function):
    """Batch norm with known statistics, whose backward pass adds up two sums over all processes."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        known: Statistics,
        shares: Shares,
        eps: float,
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.known, ctx.shares, ctx.eps = known, shares, eps
        return F.batch_norm(x, known.mean, known.variance, weight, bias, training=False, eps=eps)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        known = ctx.known
        dx, d_weight, d_bias = torch.ops.aten.native_batch_norm_backward(
            *(g, x, weight, known.mean, known.variance, None, None, False, ctx.eps),
            [True, True, True],
        )
        sums = torch.stack([d_bias, d_weight])
        ctx.shares.ranks.add(sums)
        if not ctx.shares.is_idle:
            inverse = (known.variance + ctx.eps).rsqrt()
            slope = inverse if weight is None else inverse * weight
            a, b = (-slope * sums / known.count).unbind()
            shape = [1, -1] + [1] * (x.dim() - 2)
            residue = x - known.mean.view(shape)
            dx += residue.mul_((b * inverse).view(shape)).add_(a.view(shape))
        if weight is None:
            d_weight = d_bias = None
        return dx, d_weight, d_bias, None, None, None


def whole_features(own: Features, shares: Shares) -> Features:
    """Returns the features of a batch, given those of the rows that this process computes, to which
    alone their gradients go."""
    return Features(*(f if f is None else _Whole.apply(f, shares) for f in own))


class _Whole(torch.autograd.Function):
    """The rows of all processes."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, shares: Shares) -> Tensor:
        ctx.shares = shares
        return shares.gather(own)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return ctx.shares.own(g), None


def add_gradients(parameters: Iterable[nn.Parameter], ranks: Ranks) -> None:
    """Adds up every parameter's gradient over all processes."""
    for parameter in parameters:
        if parameter.grad is not None:
            ranks.add(parameter.grad)
