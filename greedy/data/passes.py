"""Reading samples in a given order, ahead of their use, in other processes."""

import io
import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from multiprocessing.reduction import ForkingPickler
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from greedy.base.errors import UserError, first_line
from greedy.base.interrupts import SIGNALS
from greedy.data.splits import Labels, Rows, Split

GRACE = 30  # seconds that a process that reads outlives SIGTERM


def read_batches(
    split: Split,
    batches: Sequence[Rows],
    workers: int | None,
    *,
    pin_memory: bool = False,
    noted: Callable[[str], None] = lambda note: None,
) -> Iterator[tuple[Tensor, Labels]]:
    """Yields images (n, C, H, W) and labels (n,) of a split for each batch of sample numbers.

    Args:
        workers: processes that read ahead; with 0 this one reads when samples are asked for;
            ``None`` for one less than cores.
        pin_memory: put images into page-locked memory if other processes read.
        noted: is told in one sentence if other processes cannot read the split.

    Raises:
        UserError: a sample cannot be read, or a process ended.
    """
    workers = _default_workers() if workers is None else workers
    if workers and (reason := _cannot_be_sent(split)):
        noted(
            f"the process that trains also reads the data set, which cannot be sent to others "
            f"({reason}): define what it consists of at the top of a module, or set "
            f"data.num_workers to 0"
        )
        workers = 0
    if not workers:
        for batch in batches:
            images, labels = split.read(batch)
            yield torch.from_numpy(images), labels
        return
    loader = DataLoader(
        _Batches(split),
        batch_size=None,
        sampler=batches,
        num_workers=min(workers, len(batches)),
        collate_fn=_unchanged,
        pin_memory=pin_memory,
        worker_init_fn=_leave_signals,
        generator=torch.Generator(),  # else it would draw from torch's own
    )
    reading: Any = iter(loader)
    left = len(batches)
    try:
        while (read := _next(reading)) is not None:
            if read.error is not None:
                raise read.error
            left -= 1
            if not left:  # now, since a signal while a generator is deleted would be lost
                reading._shutdown_workers()
            yield torch.as_tensor(read.images), read.labels
    finally:
        reading._shutdown_workers()  # deleting it does this too, but a traceback may keep it


def _default_workers() -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max(1, (cores or 1) - 1)


@dataclass(frozen=True)
class _Read:
    """The images and labels of a batch, or why they cannot be read. Arrays go through pipes:
    tensors would need shared memory, of which containers have little."""

    images: Any
    labels: Labels
    error: UserError | None = None

    def pin_memory(self) -> "_Read":
        """Returns the batch in page-locked memory; ``DataLoader`` calls this in a thread."""
        return replace(self, images=torch.from_numpy(self.images).pin_memory())


class _Batches(Dataset[_Read]):
    """The batches of a split, each read as a whole."""

    def __init__(self, split: Split) -> None:
        self._split = split

    def __getitem__(self, rows: Any) -> _Read:
        try:
            return _Read(*self._split.read(rows))
        except UserError as error:
            error.add_note(traceback.format_exc())  # which is not sent with it
            return _Read(np.empty(0), np.empty(0, np.int64), error)


def _next(batches: Iterator[_Read]) -> _Read | None:
    """Returns the next batch, ``None`` after the last. Raises ``UserError`` if a process ended."""
    try:
        return next(batches, None)
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise UserError(
            f"a process that reads the data set ended ({first_line(error)}): free memory, or set "
            f"data.num_workers to fewer, 0 for none"
        ) from error


def _cannot_be_sent(split: Split) -> str:
    """Returns why a split cannot be sent to another process; empty if it can, or need not since
    processes are forked."""
    if multiprocessing.get_start_method() == "fork":
        return ""
    try:
        ForkingPickler(_Nowhere()).dump(split)
    except Exception as error:
        return first_line(error)
    return ""


class _Nowhere(io.RawIOBase):
    """A file that keeps nothing."""

    def write(self, data: Any) -> int:
        return len(data)


def _unchanged(batch: Any) -> Any:
    return batch


def _leave_signals(worker: int) -> None:
    """Ignores what stops a run in a terminal or under a scheduler, which sends it to all processes:
    the one that trains finishes its step and then ends those that read, by SIGTERM if need be."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _end_soon)


def _end_soon(number: int, frame: FrameType | None) -> None:
    """Leaves the process that trains the time to finish its step."""
    signal.alarm(GRACE)
