"""The gradients of a step as one CUDA graph.

A step is some hundreds of kernels, most of them small: on a fast GPU launching them one by one
takes several times as long as computing them. A graph launches the same kernels at once.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from greedy.base.torch_private import clear_cublas_workspaces

WARM_UP = 2  # steps before one is recorded, in which libraries allocate their workspaces

Gradients = Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None]]


@dataclass(frozen=True)
class StepGraph:
    """A recorded step for inputs and targets of one shape, with its own pool of memory.

    Attributes:
        graph: the recorded kernels.
        parameters: the parameters that get gradients.
        x: the input (B, *shape), overwritten before each replay.
        y: the targets, overwritten before each replay.
        loss: the loss, overwritten by each replay.
        logits: the logits (B, classes) or ``None``, overwritten by each replay.
        gradients: the gradient of each parameter, overwritten by each replay.
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
        """Records what ``compute`` does with inputs like ``x`` and ``y``, without running it."""
        graph = torch.cuda.CUDAGraph()
        x, y = x.clone(), y.clone()
        stream = torch.cuda.current_stream()
        clear_cublas_workspaces()  # the graph's are from its own pool, which is freed with it
        # Meanwhile another thread may read ahead, into page-locked memory.
        try:
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                loss, logits = compute(x, y)
        except BaseException:
            torch.cuda.set_stream(stream)  # torch stays in its own if the recording cannot end
            raise
        clear_cublas_workspaces()
        return cls(graph, parameters, x, y, loss, logits, [p.grad for p in parameters])

    def __call__(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor | None]:
        """Replays the step with other inputs, which gives every parameter its gradient. Returns
        loss and logits."""
        self.x.copy_(x)
        self.y.copy_(y)
        self.graph.replay()
        for parameter, gradient in zip(self.parameters, self.gradients, strict=True):
            parameter.grad = gradient
        return self.loss, self.logits
