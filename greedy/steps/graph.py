"""The gradients of a step as one CUDA graph.

A step is some hundreds of kernels, most of them small: on a fast GPU launching them one by one
takes several times as long as computing them. A graph launches the same kernels at once.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from greedy.base.seeds import generators_restored, global_states
from greedy.base.torch_private import (
    TorchDispatchMode,
    clear_cublas_workspaces,
    storage_key,
    tree_leaves,
)

SEED = "philox_seed"  # of attention, which keeps it on the CPU unless it is recorded
WARM_UP = 2  # steps before one is recorded, in which libraries allocate their workspaces

Gradients = Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None]]


class NotRecordable(Exception):
    """A step does what a graph would not do again in each replay."""


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


@torch.no_grad()
def require_recordable(
    compute: Gradients, x: Tensor, y: Tensor, buffers: Callable[[], Sequence[Tensor]]
) -> None:
    """Computes the gradients once, and puts buffers and generators back. What a graph replays is
    its kernels alone: an error in a recording cannot be mended, and the rest is silently left out.

    Args:
        compute: the step.
        x: its input.
        y: its targets.
        buffers: returns the buffers of its modules.

    Raises:
        NotRecordable: the step waits for the device, copies between devices, draws random numbers
            on the CPU, or puts a tensor into the place of a buffer.
    """
    before, places = buffers(), _places(buffers())
    values = [buffer.clone() for buffer in before]
    with generators_restored():
        states = global_states()
        # A compiled step that older versions of torch meet in such a mode stays eager for ever.
        with torch.enable_grad(), torch.compiler.set_stance("force_eager"), Watch() as watch:
            compute(x, y)
        if global_states() != states:
            raise NotRecordable("the step draws random numbers on the CPU")
    if _places(buffers()) != places:
        raise NotRecordable("the step replaces a buffer")
    if watch.found:
        raise NotRecordable(f"the step waits for the device in {watch.found}")
    for buffer, value in zip(before, values, strict=True):
        buffer.copy_(value)


def _places(tensors: Sequence[Tensor]) -> list[tuple[int, int]]:
    return [(id(tensor), storage_key(tensor)) for tensor in tensors]


class Watch(TorchDispatchMode):
    """Finds operators that wait for the device.

    Attributes:
        found: the name of the first one; empty if there was none.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found = ""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        devices = {t.device for t in tree_leaves((args, kwargs, result)) if isinstance(t, Tensor)}
        copies = len(devices) > 1 and SEED not in str(func._schema)
        if not self.found and (copies or _reads_numbers(func, args)):
            self.found = str(func)
        return result


def _reads_numbers(func: Any, args: Sequence[Any]) -> bool:
    """Returns whether an operator's result, its shape, or an error depends on numbers on the
    device."""
    aten = torch.ops.aten
    if func.overloadpacket in (aten.index, aten.index_put, aten.index_put_):
        masks = (torch.bool, torch.uint8)
        return any(isinstance(t, Tensor) and t.dtype in masks for t in tree_leaves(args[1]))
    if "linalg_" in func.__name__:  # solvers look at whether they have succeeded
        return func.overloadpacket is not aten.linalg_vector_norm
    return not {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}.isdisjoint(
        func.tags
    )
