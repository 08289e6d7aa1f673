"""Optimisers whose state is divided over the processes that train together."""

from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from greedy.base.ranks import Ranks
from greedy.steps.host_state import parameter_groups

SMALLEST = 4096  # numbers of a parameter; the state of a smaller one saves less than messages cost
UNIT = 64  # numbers; where parts begin, so that vector registers hold the same numbers as undivided


class Sharded(torch.optim.Optimizer):
    """An optimiser that computes each number by itself, for parameters whose gradients are the same
    in several processes. Of each parameter that is not small a process has the state of its part
    alone: it updates that part and gets the others from those that have them, so that weights have
    the bytes of an undivided optimiser. Among a class's parents it comes before a fused optimiser.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        ranks: Ranks,
        **settings: Any,
    ) -> None:
        groups = parameter_groups(parameters)
        self.trained: list[nn.Parameter] = [p for group in groups for p in group["params"]]
        self._ranks = ranks
        parts = [
            group | {"params": [nn.Parameter(self._part(p.detach())) for p in group["params"]]}
            for group in groups
        ]
        super().__init__(parts, **settings, fused=True)  # type: ignore[call-arg]

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Takes one step with the gradients of the whole parameters. All processes call it."""
        for part, trained in self._pairs():
            if trained.grad is not None:
                part.grad = self._part(_laid_out(trained.grad, trained))
        super().step(closure)
        for part, trained in self._pairs():
            part.grad = None
            if trained.grad is not None and self._divides(trained):
                self._ranks.complete(_flat(trained), self._edges(trained))

    def state_dict(self) -> dict[str, Any]:
        """Returns the state of the whole parameters, that of divided ones in host memory. All
        processes call it."""
        document = super().state_dict()
        for index, trained in enumerate(self.trained):
            if self._divides(trained) and index in document["state"]:
                document["state"][index] = {
                    name: self._whole(value, trained) if value.dim() else value
                    for name, value in document["state"][index].items()
                }
        return document

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads the state of whole parameters, of which the process keeps its part."""
        own = {
            index: {
                name: self._part(_laid_out(value, self.trained[index]))
                if value.shape == self.trained[index].shape
                else value
                for name, value in state.items()
            }
            for index, state in state_dict["state"].items()
        }
        super().load_state_dict(state_dict | {"state": own})

    def _pairs(self) -> Iterator[tuple[Tensor, nn.Parameter]]:
        parts = (part for group in self.param_groups for part in group["params"])
        return zip(parts, self.trained, strict=True)

    def _divides(self, parameter: Tensor) -> bool:
        return parameter.numel() >= max(
            SMALLEST, UNIT * self._ranks.size
        )  # so that no part is empty

    def _edges(self, parameter: Tensor) -> list[int]:
        """Returns where in a parameter the processes' parts begin, and where the last one ends."""
        units, size = -(-parameter.numel() // UNIT), self._ranks.size
        edges = (UNIT * -(-units * rank // size) for rank in range(size + 1))
        return [min(edge, parameter.numel()) for edge in edges]

    def _part(self, whole: Tensor) -> Tensor:
        """Returns a view of this process's part of a tensor, of all of it where it is small."""
        if not self._divides(whole):
            return whole
        start, stop = self._edges(whole)[self._ranks.rank :][:2]
        return _flat(whole)[start:stop]

    def _whole(self, part: Tensor, trained: Tensor) -> Tensor:
        """Returns the tensor of which each process has a part, laid out like its parameter."""
        sizes = [stop - start for start, stop in pairwise(self._edges(trained))]
        padded = torch.zeros(max(sizes), dtype=part.dtype)
        padded[: len(part)] = part
        parts = self._ranks.stack(padded)
        whole = torch.empty_like(trained, dtype=part.dtype, device="cpu")
        torch.cat([p[:size] for p, size in zip(parts, sizes, strict=True)], out=_flat(whole))
        return whole


class ShardedAdam(Sharded, torch.optim.Adam):
    """Adam whose moments are divided over processes."""


class ShardedSGD(Sharded, torch.optim.SGD):
    """SGD whose momentum is divided over processes."""


def _flat(tensor: Tensor) -> Tensor:
    """Returns the numbers of a tensor without gaps in the order that memory has them."""
    return tensor.detach().as_strided((tensor.numel(),), (1,))


def _laid_out(tensor: Tensor, like: Tensor) -> Tensor:
    """Returns a tensor in the layout of another one, without a copy if it has that."""
    if tensor.stride() == like.stride():
        return tensor
    return torch.empty_like(like, dtype=tensor.dtype, device=tensor.device).copy_(tensor)
