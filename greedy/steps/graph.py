"""The gradients of a step as one CUDA graph.

A step is some hundreds of kernels, most of them small: on a fast GPU launching them one by one
takes several times as long as computing them. A graph launches the same kernels at once.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from greedy.base.devices import release_workspaces

WARM_UP = 2  # steps before it is recorded, in which libraries take their workspaces

Gradients = Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None]]


@dataclass(frozen=True)
class StepGraph:
    """A recorded step for inputs (B, *shape) and targets of one size, in a memory pool of its own.

    Attributes:
        x, y: what is copied in before each replay.
        loss, logits: what stands there after it, until the next.
        gradients: of the parameters, likewise.
    """

    graph: torch.cuda.CUDAGraph
    parameters: Sequence[nn.Parameter]
    x: Tensor
    y: Tensor
    loss: Tensor
    logits: Tensor | None
    gradients: Sequence[Tensor | None]

    @classmethod
    def of(
        cls, compute: Gradients, parameters: Sequence[nn.Parameter], x: Tensor, y: Tensor
    ) -> "StepGraph":
        """Records what ``compute`` does with such inputs, without doing it."""
        graph = torch.cuda.CUDAGraph()
        x, y = x.clone(), y.clone()
        release_workspaces()  # the graph's are from its own pool, which has to go with it
        # Meanwhile another thread may read ahead, into page-locked memory.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            loss, logits = compute(x, y)
        release_workspaces()
        return cls(graph, parameters, x, y, loss, logits, [p.grad for p in parameters])

    def __call__(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor | None]:
        """Puts the gradients into every parameter's ``grad``. Returns loss and logits."""
        self.x.copy_(x)
        self.y.copy_(y)
        self.graph.replay()
        for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
            parameter.grad = gradient
        return self.loss, self.logits
