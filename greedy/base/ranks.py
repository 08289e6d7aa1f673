"""The processes that train together, each on its share of every batch."""

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import cached_property
from itertools import pairwise
from threading import Thread
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from greedy.base.devices import is_out_of_memory
from greedy.base.errors import TrainingError, first_line
from greedy.base.meeting import fresh_store
from greedy.base.torch_private import group_store

PATIENCE = timedelta(days=7)  # for the leader, which may write a store meanwhile
WAITING = 3.0  # seconds that a process which does not lead waits before it speaks
FAILED, SPOKEN = "greedy.failed", "greedy.spoken"  # keys in the store of the process group


@dataclass(frozen=True)
class Ranks:
    """This process among those that train together. All of them call the methods that communicate,
    in the same order.

    Attributes:
        rank: the number of this process, from 0.
        size: the number of processes.
    """

    rank: int = 0
    size: int = 1

    @classmethod
    def of_torchrun(cls) -> "Ranks":
        """Joins the processes that torchrun started; alone if it did not start this one."""
        several = dist.is_available() and dist.is_torchelastic_launched()
        if several and int(os.environ["WORLD_SIZE"]) > 1 and not dist.is_initialized():
            backend = "gloo"
            if torch.cuda.is_available():
                backend = "cpu:gloo,cuda:nccl"
                local = int(os.environ.get("LOCAL_RANK", "0"))
                if local < torch.cuda.device_count():  # else they compute on the CPU
                    torch.cuda.set_device(local)
            store, rank, size = next(dist.rendezvous("env://", timeout=PATIENCE))
            store = fresh_store(store, rank, size)
            dist.init_process_group(
                backend, store=store, rank=rank, world_size=size, timeout=PATIENCE
            )
        return cls.joined()

    @classmethod
    def joined(cls) -> "Ranks":
        """Returns the place of this process in torch's process group; alone without one."""
        if not (dist.is_available() and dist.is_initialized()):
            return ALONE
        return cls(dist.get_rank(), dist.get_world_size())

    @property
    def on_this_machine(self) -> int:
        """The number of the processes that share this machine's memory; without torchrun all."""
        return int(os.environ.get("LOCAL_WORLD_SIZE", self.size)) if self.size > 1 else 1

    def fail(self, sentence: str) -> bool:
        """Lets the leader say why this process ends, for which it has some seconds.

        Returns:
            Whether this process has to say it itself: the leader, and others that it does not hear.
        """
        if self.size == 1:
            return True
        store = group_store()
        with suppress(RuntimeError):  # where the store has ended, too
            if self.leads:
                store.set(SPOKEN, "")
                return True
            store.compare_set(FAILED, "", f"process {self.rank} has ended: {sentence}")
            # The others notice it; NCCL may wait for them meanwhile.
            Thread(target=self.leave, daemon=True).start()
            time.sleep(WAITING)
            return not store.check([SPOKEN])
        return True

    def leave(self) -> None:
        """Leaves the others; nothing can be exchanged with them any more."""
        if self.size > 1:
            dist.destroy_process_group()

    @property
    def leads(self) -> bool:
        """Whether this process writes the run and speaks to the user; the others follow it."""
        return self.rank == 0

    def add(self, tensor: Tensor) -> None:
        """Replaces a tensor by the sum of those of all processes, the same in each."""
        self.begin_adding(tensor)()

    def begin_adding(self, tensor: Tensor) -> Callable[[], None]:
        """Begins to ``add``, and returns what waits until it is done."""
        if self.size == 1:
            return lambda: None
        with self.lost_processes_named():
            work = dist.all_reduce(tensor, async_op=True)

        def finish() -> None:
            with self.lost_processes_named():
                work.wait()

        return finish

    def largest(self, number: int) -> int:
        """Returns the largest of the numbers of all processes."""
        if self.size == 1:
            return number
        found = torch.tensor(number)
        with self.lost_processes_named():
            dist.all_reduce(found, dist.ReduceOp.MAX)
        return int(found)

    def meet(self) -> None:
        """Waits until all processes have reached this call."""
        self.largest(0)

    def stack(self, tensor: Tensor) -> Tensor:
        """Returns the tensors of all processes, which have one shape, as (size, ...)."""
        if self.size == 1:
            return tensor[None]
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        with self.lost_processes_named():
            dist.all_gather(parts, tensor.contiguous())
        return torch.stack(parts)

    def complete(self, tensor: Tensor, edges: Sequence[int]) -> None:
        """Fills a tensor (n,), of which each process has the numbers between two ``edges``."""
        with self.lost_processes_named():
            for rank, (start, stop) in enumerate(pairwise(edges)):
                dist.broadcast(tensor[start:stop], rank)

    def told(self, value: Any = None, rank: int = 0) -> Any:
        """Returns in every process the ``value`` of one, the leader's by default, a JSON
        document."""
        if self.size == 1:
            return value
        data = torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8)
        size = torch.tensor([len(data)])
        with self.lost_processes_named():
            dist.broadcast(size, rank)
            data = data if self.rank == rank else torch.empty(int(size), dtype=torch.uint8)
            dist.broadcast(data, rank)
        return json.loads(bytes(data.tolist()))

    def all_told(self, value: Any) -> list[Any]:
        """Returns in every process the values of all, JSON documents."""
        return [self.told(value, rank) for rank in range(self.size)]

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        """Lets the leader pass the block before the others enter it, and of those on another
        machine first one."""
        turn = 0 if self.leads else 1 if os.environ.get("LOCAL_RANK") == "0" else 2
        for _ in range(turn):
            self.meet()
        yield
        for _ in range(turn, 2):
            self.meet()

    @contextmanager
    def lost_processes_named(self) -> Iterator[None]:
        """Raises ``TrainingError`` inside for a process that has ended or cannot be reached."""
        try:
            yield
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            raise TrainingError(
                _first_failure()
                or f"one of the {self.size} processes that train together has ended or cannot be "
                f"reached ({first_line(error)}): see what it wrote last (torchrun --log-dir), and "
                f"give the same command again, which resumes from the last checkpoint"
            ) from error

    def divided(self, rows: int) -> "Shares":
        """Returns shares of a batch that are nearly equally large."""
        edges = [rows * rank // self.size for rank in range(self.size + 1)]
        return Shares(self, [torch.arange(start, stop) for start, stop in pairwise(edges)])


ALONE = Ranks()
"""One process that trains by itself."""


@dataclass(frozen=True)
class Shares:
    """The rows of a batch that each process computes, as ascending positions in it (n,); together
    they are all rows.

    A process may have none, where the batch is small. Since layers take no empty batch, it then
    computes the first row too, of which nothing is used.
    """

    ranks: Ranks
    positions: Sequence[Tensor]

    @property
    def is_idle(self) -> bool:
        """Whether this process has no row."""
        return not len(self.positions[self.ranks.rank])

    @property
    def computed(self) -> Tensor:
        """The positions (n,) that this process computes."""
        return torch.zeros(1, dtype=torch.int64) if self.is_idle else self._own

    def part(self, rows: slice) -> tuple[slice, "Shares"]:
        """Returns of a slice of the batch which of the rows that this process computes are in it,
        and its shares."""
        within = [(p >= rows.start) & (p < rows.stop) for p in self.positions]
        positions = [
            p[inside] - rows.start for p, inside in zip(self.positions, within, strict=True)
        ]
        place = within[self.ranks.rank].nonzero()
        own = slice(int(place[0]), int(place[-1]) + 1) if len(place) else slice(0, 1)
        return own, replace(self, positions=positions)

    def gather(self, part: Tensor) -> Tensor:
        """Returns the rows (B, ...) of the batch, of which each process has those it computes."""
        if self.ranks.size == 1:
            return part
        sizes = [len(positions) for positions in self.positions]
        padded = part.new_zeros((max(sizes), *part.shape[1:]))  # all send equally many
        padded[: len(self._own)] = part[: len(self._own)]
        parts = self.ranks.stack(padded)
        rows = torch.cat([rows[:size] for rows, size in zip(parts, sizes, strict=True)])
        return rows[self._order.to(rows.device)]

    def own(self, whole: Tensor) -> Tensor:
        """Returns the rows of ``whole`` (B, ...) that this process computes, zeros for one that is
        idle."""
        if self.ranks.size == 1:
            return whole
        rows = whole[self.computed.to(whole.device)]
        return torch.zeros_like(rows) if self.is_idle else rows

    @property
    def _own(self) -> Tensor:
        return self.positions[self.ranks.rank]

    @cached_property
    def _order(self) -> Tensor:
        """The place of each row of the batch among the gathered rows."""
        return torch.cat(list(self.positions)).argsort()


def _first_failure() -> str | None:
    """Returns what the first process that failed has left in ``Ranks.fail``."""
    with suppress(RuntimeError):
        store = group_store()
        return str(store.get(FAILED).decode()) if store.check([FAILED]) else None
    return None
