"""Counting the bytes of tensors that live on a device.

Under ``FakeTensorMode`` nothing is computed and no memory is taken, yet every operator makes the
tensors it would make, so that a count of fake tensors is what a real step will allocate:

    with FakeTensorMode(), Counter() as counter:
        step(...)
    print(counter.peak)

Gradients of fake ``cuda`` tensors fail on a machine without CUDA. So the device is always called
``cpu`` there, and where its memory is not the host's, host memory is called ``meta``: copies
between the two work in both directions and are counted on one side alone.
"""

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from greedy.base.sizes import format_size


class Counter(TorchDispatchMode):
    """Inside, every storage that an operator makes is counted until it is released.

    Counted are the bytes of storages on devices of ``device_type``, each once however many views
    it has. What an operator needs only while it computes is not seen. Beyond a ``limit`` an
    operator's result is released and ``torch.OutOfMemoryError`` raised, as by an allocator,
    though here after the operator has run: running statistics may have been updated. Of a backward
    pass that fails so, torch's queue for the CPU keeps the branches that were still waiting.

    Attributes:
        live: bytes alive now, also after the mode's end.
        peak: most bytes that were alive at a time, since the start or ``reset_peak``.
        limit: bytes that may be alive; may be changed at any time.
    """

    def __init__(self, device_type: str = "cpu", limit: int | None = None) -> None:
        super().__init__()
        self.device_type = device_type
        self.limit = limit
        self.live = 0
        self.peak = 0
        self._bytes: dict[int, int] = {}  # by storage

    def add(self, tensors: Iterable[Tensor]) -> None:
        """Counts tensors that exist already, such as parameters."""
        for tensor in tensors:
            self._count(tensor)
        self.peak = max(self.peak, self.live)

    def reset_peak(self) -> None:
        """Forgets the peak so far."""
        self.peak = self.live

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        before = self.live
        for tensor in self._made(result, (args, kwargs)):
            self._count(tensor)
        if self.limit is not None and self.live > max(self.limit, before):
            wanted = self.live - before
            del result, tensor
            raise torch.OutOfMemoryError(
                f"{format_size(wanted)} more than {format_size(before)} is over the limit of "
                f"{format_size(self.limit)}"
            )
        self.peak = max(self.peak, self.live)
        return result

    def _made(self, result: Any, given: Any) -> list[Tensor]:
        """Returns the tensors of a result whose storages are counted or new, not uncounted
        arguments."""
        tensors = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        if all(_key(t) in self._bytes for t in tensors):
            return tensors
        aliased = {_key(t) for t in tree_leaves(given) if isinstance(t, Tensor)}
        return [t for t in tensors if _key(t) in self._bytes or _key(t) not in aliased]

    def _count(self, tensor: Tensor) -> None:
        """Counts a tensor's storage if it is new, else what it has grown by."""
        if tensor.device.type != self.device_type:
            return
        storage, key = tensor.untyped_storage(), _key(tensor)
        if key not in self._bytes:
            self._bytes[key] = 0
            weakref.finalize(storage, self._release, key)
        self.live += storage.nbytes() - self._bytes[key]
        self._bytes[key] = storage.nbytes()

    def _release(self, key: int) -> None:
        self.live -= self._bytes.pop(key)


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
