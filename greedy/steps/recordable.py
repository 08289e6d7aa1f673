"""Whether a CUDA graph of a step would do in each replay what the step does.

What a graph replays is its kernels alone. A step that waits for the device, or copies between
devices, ends its recording with an error that cannot be mended; numbers drawn on the CPU, and a
tensor that takes a buffer's place, would silently be those of the recording for ever.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from greedy.base.seeds import generators_restored, global_states
from greedy.base.torch_private import TorchDispatchMode, storage_key, tree_leaves
from greedy.steps.graph import Gradients

SEED = "philox_seed"  # of attention, which keeps it on the CPU unless it is recorded


class NotRecordable(Exception):
    """A step does what a graph would not do again in each replay."""


@torch.no_grad()
def require_recordable(
    compute: Gradients, x: Tensor, y: Tensor, buffers: Callable[[], Sequence[Tensor]]
) -> None:
    """Computes the gradients once, and puts buffers and generators back.

    Args:
        compute: the step.
        x: its input.
        y: its targets.
        buffers: returns the buffers of its modules.

    Raises:
        NotRecordable: the step waits for the device, copies between devices, draws random numbers
            on the CPU, or puts a tensor into the place of a buffer.
    """
    before = buffers()
    places = _places(before)
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
