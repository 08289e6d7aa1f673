"""Batch norms that see a micro-batch and normalise by the whole batch.

With x̂ = (x - mu) / sigma, y = gamma x̂ + beta and g = dL/dy, the gradient of a batch norm's input is

    dL/dx = gamma / sigma (g - m1 - x̂ m2),    m1 = mean(g), m2 = mean(g x̂)

over all values of a channel in the batch. All but mu, sigma, m1 and m2 belongs to one sample.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import CheckpointError

from greedy.base.errors import UserError
from greedy.base.precision import widened
from greedy.base.ranks import Shares
from greedy.exact.layers import LAYERS, Layers
from greedy.exact.rows import KeptRows
from greedy.exact.statistics import Statistics

DIRECT = (torch.batch_norm, torch.native_batch_norm)


class NormCall(NamedTuple):
    """The arguments of ``torch.nn.functional.batch_norm``."""

    input: Tensor
    running_mean: Tensor | None
    running_var: Tensor | None
    weight: Tensor | None = None
    bias: Tensor | None = None
    training: bool = False
    momentum: float = 0.1
    eps: float = 1e-5


class Stop(BaseException):
    """The end of a forward pass that has gathered what it was for."""


@dataclass
class Norm:
    """One call of batch norm in a forward pass, with what is known of the whole batch.

    Attributes:
        statistics: mean and variance of its input; ``None`` until they are known.
        sums: of g and of g x̂, (2, C); ``None`` until they are known. Until then no gradient passes.
        handle: zeros (2, C) whose gradient are the sums of a micro-batch, while they are gathered.
        call: its arguments when its statistics were gathered last.
        gradients: g of each micro-batch, where they are kept. Then no gradient passes: the graph
            ends at the norm and goes on at ``root``, its input.
        shares: of the processes that compute the batch; ``None`` for one alone.
        own_sums: the part of ``sums`` that comes from this process's rows, where it is not alone.
    """

    statistics: Statistics | None = None
    sums: Tensor | None = None
    handle: Tensor | None = None
    call: NormCall | None = None
    gradients: KeptRows | None = None
    root: Tensor | None = None
    shares: Shares | None = None
    own_sums: Tensor | None = None
    _partial: Statistics | None = field(default=None, repr=False)

    def __call__(self, call: NormCall, number: int) -> Tensor:
        """Normalises micro-batch ``number``, (m, C, ...); with unknown statistics adds it to them
        instead, and returns zeros."""
        if self.call is not None and not _is_same(self.call, call):
            raise differs()
        if self.statistics is None:
            part = Statistics.of(call.input.detach())
            self._partial = self._partial.merged(part) if self._partial else part
            self.call = call._replace(input=call.input.new_empty((0, *call.input.shape[1:])))
            return torch.zeros_like(call.input)
        passes = self.sums is not None and self.gradients is None
        x = call.input if passes else call.input.detach()
        self.root = None if passes or self.sums is None else call.input
        out: Tensor = Normalise.apply(
            x, call.weight, call.bias, self.handle, self, call.eps, number
        )
        return out

    def receive(self, number: int, g: Tensor) -> None:
        """Adds a part of g of micro-batch ``number``, if it is kept."""
        if self.gradients is not None:
            part = self.gradients[number]
            self.gradients[number] = g if part is None else part + g

    def root_gradient(self, number: int) -> Tensor | None:
        """Returns the gradient of ``root`` in micro-batch ``number``, of which g is freed; ``None``
        if it has none."""
        assert self.gradients is not None and self.root is not None and self.call is not None
        g = self.gradients.pop(number)
        if g is None or not self.root.requires_grad:
            return None
        return self.input_gradient(g, self.root.detach(), self.call.weight, self.call.eps)

    def input_gradient(self, g: Tensor, x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        """Returns dL/dx of a micro-batch, with known sums."""
        assert self.statistics is not None and self.sums is not None
        if self.shares and self.shares.is_idle:
            return torch.zeros_like(x)
        inverse = (self.statistics.variance + eps).rsqrt()
        slope = inverse if weight is None else inverse * weight
        a, b = (-slope * self.sums / self.statistics.count).unbind()
        b = b * inverse
        shape = [1, -1] + [1] * (x.dim() - 2)
        slope, a, b = (v.view(shape) for v in (slope, a - b * self.statistics.mean, b))
        return torch.addcmul(a, x, b).addcmul_(g, slope).to(x.dtype)

    def close_statistics(self) -> None:
        """Ends the gathering of statistics."""
        if self._partial is None or self.call is None:
            raise differs()
        found = self._partial.shared(self.shares) if self.shares else self._partial
        found.require_variance()
        like = next(
            (t for t in (self.call.weight, self.call.running_mean) if t is not None),
            widened(self.call.input[:0]),
        )
        self.statistics, self._partial = found.to(like.dtype), None

    def open_sums(self) -> Tensor:
        """Begins to gather the sums, in the gradient of the tensor that is returned."""
        assert self.statistics is not None
        mean = self.statistics.mean
        self.handle = mean.new_zeros((2, *mean.shape)).requires_grad_()
        return self.handle

    def close_sums(self) -> None:
        """Ends the gathering of the sums, which are zero where no gradient came."""
        assert self.handle is not None
        gradient = self.handle.grad
        self.sums = torch.zeros_like(self.handle) if gradient is None else gradient
        self.handle = None
        if self.shares:
            self.own_sums, self.sums = self.sums, self.sums.clone()
            self.shares.ranks.add(self.sums)

    def update_running(self) -> None:
        """Updates the running statistics, if there are any, as one forward pass of the batch
        would."""
        assert self.call is not None and self.statistics is not None
        if self.call.running_mean is not None and self.call.running_var is not None:
            self.statistics.move(self.call.running_mean, self.call.running_var, self.call.momentum)


class Normalise(torch.autograd.Function):
    """Batch norm with the statistics and sums of a ``Norm``."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        handle: Tensor | None,
        norm: Norm,
        eps: float,
        number: int,
    ) -> Tensor:
        assert norm.statistics is not None
        ctx.save_for_backward(x, weight)
        ctx.norm, ctx.eps, ctx.number = norm, eps, number
        mean, variance = norm.statistics.mean, norm.statistics.variance
        return F.batch_norm(x, mean, variance, weight, bias, training=False, eps=eps)

    @staticmethod
    def sums(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
        """Returns a micro-batch's sums of g and of g x̂, (C,) each."""
        (x, weight), known = ctx.saved_tensors, ctx.norm.statistics
        # CUDA's kernel takes no None: torch's own batch norm in evaluation mode gives it these.
        none = known.mean.new_empty(0)
        scale = torch.ones_like(known.mean) if weight is None else weight
        _, of_scaled, of_g = torch.ops.aten.native_batch_norm_backward(
            *(g, x, scale, known.mean, known.variance, none, none, False, ctx.eps),
            [False, True, True],
        )
        return of_g, of_scaled

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        norm = ctx.norm
        needs_x, *_ = ctx.needs_input_grad
        dx = gathered = None
        d_weight: Any = None
        d_bias: Any = None
        if norm.sums is not None:
            if needs_x:
                dx = norm.input_gradient(g, x, weight, ctx.eps)
            if ctx.number == 0:  # once for the batch
                d_bias, d_weight = norm.sums if norm.own_sums is None else norm.own_sums
        else:
            d_bias, d_weight = Normalise.sums(ctx, g)
            if norm.handle is not None:
                gathered = torch.stack([d_bias, d_weight])
            norm.receive(ctx.number, g)
        if weight is None:
            d_weight = d_bias = None
        return dx, d_weight, d_bias, gathered, None, None, None


class Norms(TorchFunctionMode):
    """A context in which batch norms in training are those of a sequence, in order of their calls.

    Attributes:
        norms: the norms.
        index: the number of calls since ``begin``.
        until: the number of calls after which the forward pass ends; ``None`` for none.
        layers: the layers of which some are recalled; ``None`` to compute all.
    """

    def __init__(self, norms: Sequence[Norm], layers: Layers | None = None) -> None:
        super().__init__()
        self.norms, self.layers = norms, layers
        self.index = self.number = 0
        self.until: int | None = None

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.batch_norm and (call := NormCall(*args, **kwargs)).training:
            return self._norm(call)
        if self.layers is not None and func in LAYERS:
            return self.layers(func, args, kwargs)
        if func in DIRECT:
            raise calls_directly(func)
        return func(*args, **kwargs)

    def begin(self, number: int) -> None:
        """Starts a forward pass of micro-batch ``number``."""
        self.index, self.number = 0, number
        if self.layers is not None:
            self.layers.begin(number)
            self.layers.keeps = bool(self.norms)

    def end(self) -> None:
        """Ends a whole forward pass. Raises ``UserError`` if a norm was not called."""
        if self.index != len(self.norms):
            raise differs()

    def _norm(self, call: NormCall) -> Tensor:
        if self.index == len(self.norms):
            raise differs()
        norm = self.norms[self.index]
        self.index += 1
        # What follows the zeros of an unknown norm is wrong, and what follows the last norm is
        # computed in whole forward passes alone.
        if self.layers is not None and (norm.statistics is None or self.index == len(self.norms)):
            self.layers.keeps = False
        out = norm(call, self.number)
        if self.index == self.until:
            raise Stop
        return out


def back(
    tensors: Sequence[Tensor],
    gradients: Sequence[Tensor | None],
    leaves: Sequence[Tensor] | None,
    *,
    retain: bool = False,
) -> None:
    """Adds to the gradients of ``leaves``, or of all leaves, what those of some tensors give. With
    ``retain`` the graph can be used again."""
    # Within autocast the thread of autograd may compute in float16 in any precision.
    with torch.autocast(tensors[0].device.type, enabled=False):
        try:
            torch.autograd.backward(tensors, gradients, retain_graph=retain, inputs=leaves)
        except CheckpointError as error:
            raise differs() from error


def _is_same(one: NormCall, other: NormCall) -> bool:
    return one.weight is other.weight and one.input.shape[1] == other.input.shape[1]


def calls_directly(func: Callable[..., Any]) -> UserError:
    """Returns the error that a module calls one of ``DIRECT``."""
    return UserError(
        f"the module calls torch.{func.__name__} itself: let it call torch.nn.functional.batch_norm"
    )


def differs() -> UserError:
    """Returns the error that a module's passes are not alike."""
    return UserError(
        "the module does not call the same batch norms for every micro-batch and in every pass: "
        "leave out checkpointing, and choices that depend on the samples"
    )
