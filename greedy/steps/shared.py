"""Forward and backward passes of a batch whose rows are divided over processes.

Samples meet only in batch norms and in the loss, which sees the heads' features. Where they meet,
small tensors are exchanged, so that the gradients are those of the whole batch:

- a batch norm's statistics are merged over the processes, and so are, in the backward pass, the two
  sums by which its input's gradient depends on other samples (see ``greedy.exact.norms``);
- the features of the whole batch are gathered, and every process computes the loss of all of them.
  What a process gets back are the slopes of its own rows;
- each process then has the part of every parameter's gradient that comes from its rows; they are
  added up, in the plain mode while the backward pass goes on.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from greedy.base.ranks import Shares
from greedy.exact.norms import DIRECT, Norm, Normalise, NormCall, calls_directly
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
        if func is F.batch_norm and (call := NormCall(*args, **kwargs)).training:
            return shared_norm(call, self._shares)
        if func in DIRECT:
            raise calls_directly(func)
        return func(*args, **kwargs)


def shared_norms(shares: Shares | None) -> AbstractContextManager[Any]:
    """Returns the context ``SharedNorms``; one that changes nothing where a process is alone."""
    return nullcontext() if shares is None else SharedNorms(shares)


def shared_norm(call: NormCall, shares: Shares) -> Tensor:
    """Computes a batch norm of this process's rows by the statistics of all rows, and updates its
    running statistics."""
    statistics = Statistics.of(call.input.detach()).shared(shares)
    statistics.require_variance()
    if call.running_mean is not None and call.running_var is not None:
        statistics.move(call.running_mean, call.running_var, call.momentum)
    like = next((t for t in call[1:4] if t is not None), call.input)
    norm = Norm(statistics.to(like.dtype), shares=shares)
    out: Tensor = _Normalise.apply(call.input, call.weight, call.bias, None, norm, call.eps, 0)
    return out


class _Normalise(Normalise):
    """Batch norm whose backward pass adds up its two sums over all processes."""

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        (x, weight), norm = ctx.saved_tensors, ctx.norm
        d_bias, d_weight = Normalise.sums(ctx, g)
        norm.sums = torch.stack([d_bias, d_weight])
        norm.shares.ranks.add(norm.sums)
        dx = norm.input_gradient(g, x, weight, ctx.eps)
        of_affine = (None, None) if weight is None else (d_weight, d_bias)
        return dx, *of_affine, None, None, None, None


def gathered(own: Features, shares: Shares | None) -> Features:
    """Returns the features of a batch without gradient, given those of the rows that this process
    computes; the same where it is alone."""
    return own if shares is None else _each(shares.gather, own)


def own_rows(whole: Features, shares: Shares | None) -> Features:
    """Returns of the features of a batch, or their slopes, the rows that this process computes."""
    return whole if shares is None else _each(shares.own, whole)


def _each(function: Callable[[Tensor], Tensor], features: Features) -> Features:
    found: Any = (None if feature is None else function(feature) for feature in features)
    return Features(*found)


def whole_features(own: Features, shares: Shares | None) -> Features:
    """Returns the features of a batch, given those of the rows that this process computes, to which
    alone their gradients go; the same where it is alone."""
    return own if shares is None else _each(lambda part: _Whole.apply(part, shares), own)


class _Whole(torch.autograd.Function):
    """The rows of all processes."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, shares: Shares) -> Tensor:
        ctx.shares = shares
        return shares.gather(own)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        return ctx.shares.own(g), None


@contextmanager
def gradients_added(parameters: Iterable[nn.Parameter], shares: Shares | None) -> Iterator[None]:
    """Adds up over all processes, if there are several, the gradients that a backward pass inside
    gives. Each sets out once it is there, while the pass goes on to earlier layers. What travels is
    a copy: the pass may still read a gradient, or add to that of a parameter that it reaches
    again."""
    if shares is None:
        yield
        return
    sums: dict[nn.Parameter, Tensor] = {}
    under_way: dict[nn.Parameter, Callable[[], None]] = {}

    def set_out(parameter: Tensor) -> None:
        assert isinstance(parameter, nn.Parameter) and parameter.grad is not None
        if parameter in under_way:
            under_way[parameter]()
        own = parameter.grad
        sums[parameter] = torch.zeros_like(own) if shares.is_idle else own.clone()
        under_way[parameter] = shares.ranks.begin_adding(sums[parameter])

    trained = [parameter for parameter in dict.fromkeys(parameters) if parameter.requires_grad]
    hooks = [parameter.register_post_accumulate_grad_hook(set_out) for parameter in trained]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
    for parameter, finish in under_way.items():
        finish()
        parameter.grad = sums[parameter]
    # Of an earlier pass, if this one did not reach the parameter.
    add_gradients([parameter for parameter in trained if parameter not in under_way], shares)


def add_gradients(parameters: Iterable[nn.Parameter], shares: Shares | None) -> None:
    """Adds up every parameter's gradient over all processes, if there are several."""
    for parameter in parameters:
        if parameter.grad is not None and shares is not None:
            if shares.is_idle:
                parameter.grad.zero_()
            shares.ranks.add(parameter.grad)
