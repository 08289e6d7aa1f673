"""What a stage trains from."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from greedy.base.devices import preferred_layout, to_device
from greedy.base.precision import autocast
from greedy.base.seeds import derive_seed, torch_generator
from greedy.cache import (
    LIMITED_WINDOW_ROWS,
    BatchLoader,
    Store,
    row_order,
    window_chunks,
    window_order,
)
from greedy.data import Augmentation, Draws, prepare
from greedy.models import Stage

WRITE_ROWS = 1024  # of a store, computed at a time at most


@dataclass(frozen=True)
class Images:
    """What happens to the raw images of stage 0 on reading."""

    mean: Sequence[float]
    std: Sequence[float]
    augmentation: Augmentation
    _tables: dict[torch.device, list[Tensor]] = field(default_factory=dict, init=False, repr=False)

    def draw(self, store: Store, seed: int, *key: int | str) -> Draws:
        """The augmentation of all rows of a store in the epoch or view that ``key`` names."""
        generator = torch_generator(seed, "augmentation", *key)
        height, width = store.row_shape[1:]
        return self.augmentation.draw(store.rows, height, width, generator)

    def prepare(self, images: Tensor, draws: Draws | None) -> Tensor:
        """Raw images (B, C, H, W) as the network sees them; without draws, not augmented."""
        augmentation = self.augmentation if draws else None
        if (device := images.device) not in self._tables:  # copied once: a copy would wait
            self._tables[device] = [torch.tensor(v, device=device) for v in (self.mean, self.std)]
        mean, std = self._tables[device]
        return prepare(images, mean, std, augmentation, draws)


@dataclass
class Source:
    """The store a stage trains from, and the frozen stages between the two.

    Attributes:
        number: of the stage whose store it is.
        path: of the store.
        stores: its splits.
        images: for stage 0 alone, whose rows are augmented anew in every epoch; other stores
            hold views.
        replayed: frozen stages after the store's, computed on the fly.
        replay_rows: how many rows go through them at a time.
        held_out: how many of the training rows, the last ones, take no part in an epoch.
        refresh: where views are refreshed, writes those of an epoch and says whether it had to.
        precision: of the replayed stages.
        resident: the training split in memory (views, rows, ...), if it is held there.
    """

    number: int
    path: Path
    stores: dict[str, Store]
    device: torch.device
    seed: int
    images: Images | None = None
    replayed: Sequence[Stage] = ()
    replay_rows: int = WRITE_ROWS
    held_out: int = 0
    refresh: Callable[[int], bool] | None = None
    precision: str = "float32"
    resident: np.ndarray | None = field(default=None, repr=False)

    def hold_in_memory(self) -> None:
        """Loads the training split, so that its rows can be shuffled one by one."""
        self.resident = self.stores["train"].load()

    def at_epoch(self, epoch: int) -> None:
        """Makes sure that the store holds the views this epoch trains on."""
        if self.refresh is not None and self.refresh(epoch):
            self.stores["train"] = Store(self.path / "train", self.stores["train"].advice)
            if self.resident is not None:
                self.resident = None  # let go of the old views before taking memory for the new
                self.hold_in_memory()

    def epoch(
        self,
        stage: int,
        epoch: int,
        batch_size: int,
        classes_per_batch: int = 0,
        start_batch: int = 0,
    ) -> "Epoch":
        """The shuffled batches of one epoch of a stage's training, of at most
        ``classes_per_batch`` classes or so unless that is 0, from the batch ``start_batch`` on."""
        store = self.stores["train"]
        known: dict[str, Any] = {
            "seed": derive_seed(self.seed, "order", stage),
            "epoch": epoch,
            "rows": store.rows - self.held_out,
            "views": store.views,
        }
        if self.resident is not None:
            order = row_order(**known)
        else:
            wanted = {"rows": LIMITED_WINDOW_ROWS} if classes_per_batch else {}
            window = window_chunks(store.chunk_rows, **wanted)
            order = window_order(**known, chunk_rows=store.chunk_rows, window=window)
        batches = (
            order.limited_batches(store.labels, batch_size, classes_per_batch)
            if classes_per_batch
            else order.batches(batch_size)
        )
        loader = BatchLoader(
            store if self.resident is None else self.resident,
            store.labels,
            order,
            batches,
            start_batch=start_batch,
            pin_memory=self.device.type == "cuda",
        )
        draws = self.images.draw(store, self.seed, stage, epoch) if self.images else None
        return Epoch(self, loader, draws)

    def view(
        self,
        split: str,
        view: int,
        batch_size: int,
        *,
        generation: int = 0,
        start: int = 0,
        stop: int | None = None,
    ) -> Iterator["Batch"]:
        """A view's rows in order. Views of stage 0 are drawn, anew for each generation; the test
        split is not augmented."""
        store = self.stores[split]
        draws = None
        if self.images and split == "train":
            draws = self.images.draw(store, self.seed, "generation", generation, "view", view)
            view = 0
        row = start
        for values in store.batches(view, batch_size, start, stop):
            numbers = np.arange(row, row + len(values))
            yield self.batch(torch.from_numpy(values), store.labels[numbers], numbers, draws)
            row += len(values)

    def batch(
        self, values: Tensor, labels: np.ndarray, numbers: np.ndarray, draws: Draws | None
    ) -> "Batch":
        """Stored rows (B, *stored_shape), whose numbers and labels are (B,), as a batch. ``draws``
        are those of all rows of the store."""

        def read(rows: slice) -> Tensor:
            return self.inputs(values[rows], draws and draws[numbers[rows]])

        return Batch(self.labels(labels), read)

    def held_out_rows(self, batch_size: int) -> Iterator["Batch"]:
        """The held-out training rows, of view 0."""
        rows = self.stores["train"].rows
        return self.view("train", 0, batch_size, start=rows - self.held_out, stop=rows)

    def inputs(self, values: np.ndarray | Tensor, draws: Draws | None) -> Tensor:
        """Stored rows (B, *stored_shape) as the stage's input (B, *shape), float32."""
        stored = to_device(values, self.device)
        if self.images:
            x = self.images.prepare(stored, draws)
        else:  # before they are floats, where each is a number already
            x = self.stores["train"].encoding.decode(preferred_layout(stored))
        x = preferred_layout(x)
        if not self.replayed:
            return x.float()
        with torch.no_grad(), autocast(x.device.type, self.precision):
            return replay(self.replayed, x, self.replay_rows).float()

    def labels(self, labels: np.ndarray) -> Tensor:
        """Labels (B,) on the device."""
        return to_device(labels, self.device)


def replay(stages: Sequence[Stage], x: Tensor, rows: int) -> Tensor:
    """What frozen stages make of inputs (B, *shape), so many rows at a time: stages before the
    last may make much more of a row than it does."""
    if not stages:
        return x
    parts = [reduce(lambda x, stage: stage(x), stages, part) for part in x.split(rows)]
    return torch.cat(parts) if len(parts) > 1 else parts[0]


@dataclass(frozen=True)
class Epoch:
    """The batches of one epoch; iterate once."""

    source: Source
    loader: BatchLoader
    draws: Draws | None

    @property
    def rows(self) -> int:
        """The number of rows that take part."""
        return self.source.stores["train"].rows - self.source.held_out

    def __iter__(self) -> Iterator["Batch"]:
        for batch in self.loader:
            yield self.source.batch(batch.values, batch.labels, batch.rows, self.draws)


@dataclass(frozen=True)
class Batch:
    """The rows of one step, whose inputs are computed when they are asked for.

    Attributes:
        labels: (B,), on the device.
        read: rows of the batch to their inputs (rows, *shape) on the device, before dropout.
        mask: of dropout, (B, ...), for rows of inputs to be multiplied with.
    """

    labels: Tensor
    read: Callable[[slice], Tensor]
    mask: Tensor | None = None

    def inputs(self, rows: slice = slice(None)) -> Tensor:
        """The stage's inputs (rows, *shape), dropout applied."""
        x = self.read(rows)
        return x if self.mask is None else x * self.mask[rows]
