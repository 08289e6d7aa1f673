"""Training images that are read again from the data set in every pass."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from greedy.base.errors import UserError
from greedy.base.text import first_names
from greedy.cache import Store, StoredBatch
from greedy.data import Split
from greedy.data.mapstyle import MapSplit
from greedy.data.passes import read_batches


@dataclass(frozen=True)
class FreshImages:
    """The training images of a run whose data set draws them at random. A pass through the data
    set is a view or a live epoch.

    Attributes:
        run: its directory, for errors.
        split: the data set's training split; ``None`` if it was not given.
        seed: of the run.
        workers: processes that read; ``None`` for as many as the cores allow.
        pin_memory: whether images are put into page-locked memory.
        noted: is told in one sentence if other processes cannot read.
    """

    run: Path
    split: Split | None
    seed: int
    workers: int | None
    pin_memory: bool
    noted: Callable[[str], None]

    def epoch(
        self, store: Store, batches: Sequence[np.ndarray], stage: int, epoch: int
    ) -> Iterator[StoredBatch]:
        """Yields batches of row numbers of stage 0's training split ``store``, as ``BatchLoader``
        does, drawn for an epoch of a stage."""
        split = require_data_set(self.run, self.split).seeded(self.seed, "epoch", stage, epoch)
        for rows, images in zip(batches, self._read(split, store, batches), strict=True):
            yield StoredBatch(rows, np.zeros_like(rows), images, store.labels[rows])

    def view(
        self, store: Store, number: int, batch_size: int, start: int, stop: int | None
    ) -> Iterator[Tensor]:
        """Yields images of the rows ``start`` to ``stop`` of a view, in order. View 0 is stored."""
        if number == 0:
            yield from map(torch.from_numpy, store.batches(0, batch_size, start, stop))
            return
        split = require_data_set(self.run, self.split).view(self.seed, number)
        rows = np.arange(start, store.rows if stop is None else stop)
        batches = [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
        yield from self._read(split, store, batches)

    def _read(
        self, split: MapSplit, store: Store, batches: Sequence[np.ndarray]
    ) -> Iterator[Tensor]:
        """Yields the images (B, C, H, W) of each batch of row numbers (B,). Raises ``UserError`` if
        their labels are not the store's."""
        samples = read_batches(
            split,
            [store.index[rows] for rows in batches],
            self.workers,
            pin_memory=self.pin_memory,
            noted=self.noted,
        )
        for rows, (images, labels) in zip(batches, samples, strict=True):
            if len(other := rows[labels != store.labels[rows]]):
                raise UserError(
                    f"the labels of {split.name} are not those that {self.run} stored (samples "
                    f"{first_names(store.index[other].tolist())}): a transform must not change "
                    f"labels at random, and another data set needs another run"
                )
            yield images


@dataclass(frozen=True)
class FreshEpoch:
    """The batches of ``FreshImages.epoch``. Processes read for an iteration, and end with it."""

    images: FreshImages
    store: Store
    batches: Sequence[np.ndarray]
    stage: int
    epoch: int

    def __iter__(self) -> Iterator[StoredBatch]:
        return self.images.epoch(self.store, self.batches, self.stage, self.epoch)


def require_data_set(run: Path, split: Split | None) -> MapSplit:
    """Returns the training split of a run that reads it in every pass. Raises ``UserError`` if it
    was not given."""
    if isinstance(split, MapSplit):
        return split
    raise UserError(
        f"{run} reads its data set again in every pass, and was not given it: add --data with the "
        f"module:function that returns it, or in Python call fit with it"
    )
