"""A counter of the bytes of tensors on a device.

Under ``FakeTensorMode`` nothing is computed and no memory is taken, but every operator makes the
same tensors as always, so that a count of fake tensors is what a real step allocates:

    with FakeTensorMode(), Counter() as counter:
        step(...)
    print(counter.peak)

Gradients of fake ``cuda`` tensors fail on a machine without CUDA. Fake tensors on any device
therefore have the device ``cpu``, and those in host memory, if that is not the device's, have the
device ``meta``: copies between the two work in both directions, and only one side is counted.
"""

import weakref
from collections.abc import Iterable
from typing import Any

from torch import Tensor

from greedy.base.torch_private import DEVICE, TorchDispatchMode, storage_key, tree_leaves


class Counter(TorchDispatchMode):
    """Counts every storage that an operator makes inside its ``with``, until it is released.

    Counted are the bytes of storages on devices of ``device_type``, each once, however many views
    it has. The working memory of an operator is not counted.

    Attributes:
        device_type: the type of the devices whose storages are counted.
        live: bytes in use now, also after the ``with``.
        peak: most bytes in use at a time since the start or ``reset_peak``.
    """

    def __init__(self, device_type: str = "cpu") -> None:
        super().__init__()
        self.device_type = device_type
        self.live = 0
        self.peak = 0
        self._bytes: dict[int, int] = {}  # by storage

    def add(self, tensors: Iterable[Tensor]) -> None:
        """Counts tensors that were made before, such as parameters."""
        for tensor in tensors:
            self._count(tensor)
        self.peak = max(self.peak, self.live)

    def reset_peak(self) -> None:
        """Sets the peak to the bytes in use now."""
        self.peak = self.live

    def add_peak(self, count: int) -> None:
        """Counts bytes that were in use for a moment, beyond those in use now."""
        self.peak = max(self.peak, self.live + count)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func is DEVICE:  # which is asked more often than anything is computed
            return result
        for tensor in self._made(result, (args, kwargs)):
            self._count(tensor)
        self.peak = max(self.peak, self.live)
        return result

    def _made(self, result: Any, given: Any) -> list[Tensor]:
        """Returns the tensors in an operator's result whose storages are counted already or are not
        those of its arguments."""
        tensors = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        if all(storage_key(t) in self._bytes for t in tensors):
            return tensors
        aliased = {storage_key(t) for t in tree_leaves(given) if isinstance(t, Tensor)}
        return [
            t for t in tensors if storage_key(t) in self._bytes or storage_key(t) not in aliased
        ]

    def _count(self, tensor: Tensor) -> None:
        """Counts a tensor's storage if it is new, else the bytes by which it has grown."""
        if tensor.device.type != self.device_type:
            return
        storage, key = tensor.untyped_storage(), storage_key(tensor)
        if key not in self._bytes:
            self._bytes[key] = 0
            weakref.finalize(storage, self._release, key)
        self.live += storage.nbytes() - self._bytes[key]
        self._bytes[key] = storage.nbytes()

    def _release(self, key: int) -> None:
        self.live -= self._bytes.pop(key)
