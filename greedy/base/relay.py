"""The processes that train a network's stages one after the other, each some consecutive ones."""

from collections import defaultdict, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Self

import torch
import torch.distributed as dist
from torch import Tensor

from greedy.base.ranks import ALONE, Ranks
from greedy.base.tensorfile import DTYPE_NAMES

AHEAD = 2  # batches that are sent and not yet taken
DIMENSIONS = 8  # at most
BATCH, FORM, WORD = range(3)  # kinds of messages, which do not wait for each other
TYPES = list(DTYPE_NAMES)


class Form(NamedTuple):
    """What batches of activations have in common.

    Attributes:
        type: the position of their dtype in ``TYPES``.
        order: their dimensions, the one with the longest stride first.
        row: the shape of a row.
    """

    type: int
    order: tuple[int, ...]
    row: tuple[int, ...]

    @classmethod
    def of(cls, x: Tensor) -> Self:
        """Returns the form of a batch (B, ...)."""
        strides = torch.empty_like(x, device="meta").stride()  # of one that is dense
        order = sorted(range(x.dim()), key=lambda dimension: -strides[dimension])
        return cls(TYPES.index(x.dtype), tuple(order), tuple(x.shape[1:]))

    @classmethod
    def read(cls, numbers: Tensor) -> Self:
        """Returns the form that ``numbers`` gave."""
        kind, count, *rest = numbers.tolist()
        return cls(kind, tuple(rest[:count]), tuple(rest[count : 2 * count - 1]))

    def numbers(self) -> Tensor:
        """Returns the form as int64 numbers, equally many for all forms."""
        own = [self.type, len(self.order), *self.order, *self.row]
        return torch.tensor(own + [0] * (2 + 2 * DIMENSIONS - len(own)))

    def empty(self, rows: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Returns the contiguous memory of a batch, and the batch (rows, ...) in it."""
        shape = (rows, *self.row)
        memory = torch.empty(
            [shape[dimension] for dimension in self.order], dtype=TYPES[self.type], device=device
        )
        places = [self.order.index(dimension) for dimension in range(len(shape))]
        return memory, memory.permute(places)


@dataclass
class Relay:
    """The place of this process in the chain through which each batch goes: its stages get their
    inputs from the process before and pass their outputs on. A process alone is a chain of one.

    Attributes:
        ranks: the processes, in the order of their stages.
        device: on which the stages compute.
    """

    ranks: Ranks = ALONE
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    _sent: dict[int, deque[tuple[Any, Tensor]]] = field(
        default_factory=lambda: defaultdict(deque), init=False, repr=False
    )
    _sent_forms: dict[bool, Form] = field(default_factory=dict, init=False, repr=False)
    _forms: dict[bool, Form] = field(default_factory=dict, init=False, repr=False)

    @property
    def is_first(self) -> bool:
        """Whether this process has the first stage."""
        return self.ranks.rank == 0

    @property
    def is_last(self) -> bool:
        """Whether this process has the last stage."""
        return self.ranks.rank == self.ranks.size - 1

    def send(self, outputs: Tensor, *, training: bool) -> None:
        """Passes the outputs (B, ...) of this process's stages on, if there are stages after them.
        Waits while ``AHEAD`` earlier batches have not been taken."""
        if self.is_last:
            return
        outputs = outputs.detach()
        form = Form.of(outputs)
        if self._sent_forms.setdefault(training, form) is form:
            self._post(form.numbers(), FORM)
        self._post(outputs.permute(form.order).contiguous(), BATCH)

    def receive(self, rows: Sequence[int], *, training: bool) -> Iterator[Tensor]:
        """Yields the inputs of this process's stages for batches with these numbers of rows. While
        one is in use, the next one arrives."""
        coming = [self._expect(count, training) for count in rows[:1]]
        for following in (*rows[1:], 0)[: len(rows)]:
            work, batch = coming.pop()
            with self.ranks.lost_processes_named():
                work.wait()
            if following:
                coming.append(self._expect(following, training))
            yield batch

    def passed_on(self, word: int) -> int:
        """Returns in every process the word of the first one, once each has reached this call."""
        if not self.is_first:
            word = int(self._received(torch.zeros(1, dtype=torch.int64), WORD))
        if not self.is_last:
            self._post(torch.tensor([word]), WORD)
        return word

    def gathered(self, own: list[Any]) -> list[Any]:
        """Returns in every process the JSON values of all of them, in the order of the stages."""
        return [value for values in self.ranks.all_told(own) for value in values]

    def _expect(self, rows: int, training: bool) -> tuple[Any, Tensor]:
        """Begins to receive a batch. Returns what is to be waited for, and the batch."""
        if training not in self._forms:
            numbers = self._received(torch.zeros(2 + 2 * DIMENSIONS, dtype=torch.int64), FORM)
            self._forms[training] = Form.read(numbers)
        memory, batch = self._forms[training].empty(rows, self.device)
        with self.ranks.lost_processes_named():
            return dist.irecv(memory, self.ranks.rank - 1, tag=BATCH), batch

    def _received(self, message: Tensor, kind: int) -> Tensor:
        with self.ranks.lost_processes_named():
            dist.recv(message, self.ranks.rank - 1, tag=kind)
        return message

    def _post(self, message: Tensor, kind: int) -> None:
        sent = self._sent[kind]
        with self.ranks.lost_processes_named():
            sent.append((dist.isend(message, self.ranks.rank + 1, tag=kind), message))
            while len(sent) > AHEAD:
                sent.popleft()[0].wait()
