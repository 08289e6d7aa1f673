"""Networks, losses and optimisers on fake tensors, which have sizes and no numbers."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor, nn

from greedy.base.errors import UserError
from greedy.base.ranks import Ranks, Shares
from greedy.base.torch_private import (
    BATCH_NORMS,
    DEPENDS_ON_NUMBERS,
    FakeTensorMode,
    without_modes,
)
from greedy.cache.order import largest_share
from greedy.losses import Features, LocalHeads, LocalLoss
from greedy.models import Shape

Module = TypeVar("Module", bound=nn.Module)
T = TypeVar("T")


@dataclass(frozen=True)
class FakeRanks(Ranks):
    """The first of several processes, of which the others do not exist: what it gets from them has
    sizes and no numbers."""

    def begin_adding(self, tensor: Tensor) -> Callable[[], None]:
        return lambda: None

    def complete(self, tensor: Tensor, edges: Sequence[int]) -> None:
        pass

    def stack(self, tensor: Tensor) -> Tensor:
        return torch.stack([torch.empty_like(tensor) for _ in range(self.size)])


class FakeShares(Shares):
    """Shares of a batch, with numbers although other tensors have none."""

    def part(self, rows: slice) -> tuple[slice, Shares]:
        with without_modes():
            return super().part(rows)


def largest_first(rows: int, processes: int) -> Shares | None:
    """Returns shares of a batch of ``rows`` rows, of which the first is as large as any can be;
    ``None`` for one process."""
    if processes == 1:
        return None
    first = largest_share(rows, processes)
    with without_modes():
        positions = torch.arange(rows)
        others = positions[first:].tensor_split(processes - 1)
        return FakeShares(FakeRanks(0, processes), [positions[:first], *others])


def fake_tensors() -> FakeTensorMode:
    """Returns a context in which tensors have sizes and no numbers, those that modules or losses
    hold as plain attributes included."""
    return FakeTensorMode(allow_non_fake_inputs=True)


def materialise(network: Module) -> Module:
    """Replaces the parameters and buffers of a network on the meta device by empty ones in memory
    and returns the network. A tensor with two names stays one tensor."""
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
        if isinstance(module, BATCH_NORMS) and module.momentum is None:
            module.momentum = 0.1  # it takes as much memory, and asks no tensor for a number
    return network


def count_with_loss(count: Callable[[LocalLoss], T], loss: LocalLoss, what: str) -> T:
    """Returns ``count(loss)``, or the count with ``LossStandIn`` if the loss depends on the numbers
    in its tensors, which fake tensors do not have.

    Args:
        what: the part of the network that is counted, for messages.

    Raises:
        UserError: the loss fails, or something else in the part depends on numbers.
    """
    try:
        return count(loss)
    except UserError:
        raise
    except Exception as error:
        without = _count_without(loss, count, what)
        if isinstance(error, DEPENDS_ON_NUMBERS):
            return without
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise UserError(
            f"the loss {type(loss).__name__} fails in {what} ({reason}): it gets features and "
            f"one-hot labels (rows, classes), or its heads' targets, and returns a scalar tensor"
        ) from error


def _count_without(loss: LocalLoss, count: Callable[[LocalLoss], T], what: str) -> T:
    try:
        return count(LossStandIn(loss))
    except DEPENDS_ON_NUMBERS as error:
        raise UserError(
            f"the memory of {what} cannot be told beforehand, since what it computes depends on "
            f"the numbers it sees: choose between tensors with torch.where"
        ) from error


@dataclass(frozen=True)
class LossStandIn:
    """A loss with the heads of another one, but a simple function of their features. The memory of
    the function itself is small."""

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
) -> bool:
    """Takes a step on fake tensors, so that the optimisers have their state. The state of one whose
    step depends on numbers is replaced by Adam's moments. Returns whether none does.

    Raises:
        UserError: an optimiser needs to compute the loss itself.
    """
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    takes_steps = True
    for optimizer in optimizers:
        closure = inspect.signature(optimizer.step).parameters.get("closure")
        if closure is not None and closure.default is inspect.Parameter.empty:
            raise UserError(
                f"{type(optimizer).__name__} wants to compute the loss several times a step, which "
                f"stages cannot: choose an optimiser whose step needs no closure"
            )
        try:
            optimizer.step()
        except DEPENDS_ON_NUMBERS:
            takes_steps = False
            for parameter in (p for group in optimizer.param_groups for p in group["params"]):
                moments = {name: torch.zeros_like(parameter) for name in ("first", "second")}
                optimizer.state[parameter] = moments
    for parameter in parameters:
        parameter.grad = None
    return takes_steps
