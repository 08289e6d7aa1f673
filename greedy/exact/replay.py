"""A module's random numbers and buffers, the same in every pass over a micro-batch."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Self

import torch
from torch import Tensor, nn

from greedy.base.errors import UserError
from greedy.base.seeds import derive_seed
from greedy.base.torch_private import BATCH_NORMS, generators


class Replay:
    """A context in which modules draw the same numbers, and find the same buffers, each time that
    they see a micro-batch. After it the buffers are as after one forward pass; after an error they
    are as before.

    Args:
        parts: the modules.
        device: their device.
        fake: whether tensors have no numbers.
    """

    def __init__(
        self, parts: Sequence[nn.Module], device: torch.device, *, fake: bool = False
    ) -> None:
        self.generators = generators(device)
        # Drawn, so that the next batch gets other numbers.
        draw = torch.randint(2**62, (), generator=self.generators[0], device="cpu")
        self.fake = fake
        self.seed = 0 if fake else int(draw)
        places = {
            id(buffer): Buffer(module, name, buffer)
            for part in parts
            for module in part.modules()
            for name, buffer in module.named_buffers(recurse=False)
        }
        self.buffers = list(places.values())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for buffer in self.buffers:
            buffer.restore(surely=kind is not None)
            if kind is None:
                buffer.learn()

    @contextmanager
    def micro_batch(self, part: int, number: int) -> Iterator[None]:
        """Returns a context for a forward pass of micro-batch ``number`` through part ``part``."""
        for buffer in self.buffers:
            buffer.restore()
        states = [generator.get_state() for generator in self.generators]
        for generator in self.generators:
            generator.manual_seed(derive_seed(self.seed, "micro-batch", part, number))
        try:
            yield
        finally:
            for generator, state in zip(self.generators, states, strict=True):
                generator.set_state(state)

    def observe(self) -> None:
        """Remembers what a whole forward pass made of the buffers. Raises ``UserError`` for one
        that another micro-batch left otherwise."""
        for buffer in self.buffers:
            buffer.observe(fake=self.fake)


class Buffer:
    """A buffer that a forward pass may change, in place or by another tensor.

    Args:
        module: its module.
        name: its name there.
        tensor: the buffer.
    """

    def __init__(self, module: nn.Module, name: str, tensor: Tensor) -> None:
        self.module, self.name, self.tensor = module, name, tensor
        self.before = tensor.detach().clone()
        self.version = tensor._version
        self.after: Tensor | None = None
        # It counts forward passes, and nothing else.
        self.counts = isinstance(module, BATCH_NORMS) and name == "num_batches_tracked"

    def restore(self, *, surely: bool = False) -> None:
        """Sets the buffer to its first value; ``surely`` also where torch did not see it change, as
        in a batch norm that is computed again."""
        if surely or self.tensor._version != self.version:
            self._set(self.before)
        self.module._buffers[self.name] = self.tensor

    def observe(self, *, fake: bool) -> None:
        """Remembers the value after a forward pass, if it has changed."""
        current = self.module._buffers[self.name]
        if current is self.tensor and self.tensor._version == self.version:
            return
        assert current is not None
        if self.after is None:
            self.after = current.detach().clone()
        elif not (self.counts or fake or torch.equal(self.after, current)):
            raise UserError(
                f"the buffer {self.name} of {type(self.module).__name__} learns from the samples "
                f"that it sees, of which a micro-batch has only a part: put the module into "
                f"evaluation mode"
            )

    def learn(self) -> None:
        """Sets the buffer to the value that was observed."""
        if self.after is not None:
            self._set(self.after)

    def _set(self, value: Tensor) -> None:
        with torch.no_grad():
            self.tensor.copy_(value)
        self.version = self.tensor._version
