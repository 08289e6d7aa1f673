"""Networks, losses and optimisers on fake tensors, which have sizes and no numbers."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)

from greedy.base.errors import UserError
from greedy.losses import Features, LocalHeads, LocalLoss
from greedy.models import Shape

Module = TypeVar("Module", bound=nn.Module)

LOOKS_AT_NUMBERS = (DataDependentOutputException, DynamicOutputShapeException)


def fake_tensors() -> FakeTensorMode:
    """Returns a context in which tensors have sizes and no numbers, also those that modules or
    losses hold as plain attributes."""
    return FakeTensorMode(allow_non_fake_inputs=True)


def materialised(network: Module) -> Module:
    """Gives a network of the meta device parameters and buffers in memory; one tensor under two
    names stays one. Returns the network."""
    made: dict[int, torch.Tensor] = {}
    for module in network.modules():
        parameters = module.named_parameters(recurse=False, remove_duplicate=False)
        buffers = module.named_buffers(recurse=False, remove_duplicate=False)
        for name, tensor in [*parameters, *buffers]:
            if id(tensor) not in made:
                empty = torch.empty(tensor.shape, dtype=tensor.dtype)
                is_trained = isinstance(tensor, nn.Parameter)
                made[id(tensor)] = (
                    nn.Parameter(empty, tensor.requires_grad) if is_trained else empty
                )
            setattr(module, name, made[id(tensor)])
    return network


def counted(count: Callable[[LocalLoss], int], loss: LocalLoss, what: str) -> int:
    """What a count comes to that is given a loss; a loss that looks at numbers is left out of it.
    Raises ``UserError`` for a loss that fails, or where something else looks at numbers, which is
    part of ``what``."""
    try:
        return count(loss)
    except UserError:
        raise
    except Exception as error:
        without = _without(loss, count, what)
        if isinstance(error, LOOKS_AT_NUMBERS):
            return without
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise UserError(
            f"the loss {type(loss).__name__} fails in {what} ({reason}): it gets features and "
            f"one-hot labels (rows, classes), or its heads' targets, and returns a scalar tensor"
        ) from error


def _without(loss: LocalLoss, count: Callable[[LocalLoss], int], what: str) -> int:
    try:
        return count(LossStandIn(loss))
    except LOOKS_AT_NUMBERS as error:
        raise UserError(
            f"the memory of {what} cannot be told beforehand, since what it computes depends on "
            f"the numbers it sees: choose between tensors with torch.where"
        ) from error


@dataclass(frozen=True)
class LossStandIn:
    """Stands in for a loss, which is computed from small tensors, between its heads."""

    loss: LocalLoss

    @property
    def output_scale(self) -> float:
        return self.loss.output_scale

    def heads(self, shape: Shape, num_classes: int) -> LocalHeads:
        return self.loss.heads(shape, num_classes)

    def __call__(self, features: Features, y: torch.Tensor) -> torch.Tensor:
        return torch.stack([f.mean() for f in features if f is not None]).sum()


def make_state(
    parameters: Sequence[nn.Parameter], optimizers: Sequence[torch.optim.Optimizer]
) -> None:
    """Takes a step, so that the optimisers have their state; if one looks at numbers, Adam's
    moments stand for it.

    Raises ``UserError`` for an optimiser that computes the loss itself.
    """
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    for optimizer in optimizers:
        closure = inspect.signature(optimizer.step).parameters.get("closure")
        if closure is not None and closure.default is inspect.Parameter.empty:
            raise UserError(
                f"{type(optimizer).__name__} wants to compute the loss several times a step, which "
                f"stages cannot: choose an optimiser whose step needs no closure"
            )
        try:
            optimizer.step()
        except LOOKS_AT_NUMBERS:
            for parameter in (p for group in optimizer.param_groups for p in group["params"]):
                moments = {name: torch.zeros_like(parameter) for name in ("first", "second")}
                optimizer.state[parameter] = moments
    for parameter in parameters:
        parameter.grad = None
