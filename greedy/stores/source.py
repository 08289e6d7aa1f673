"""The source that a stage trains from."""

import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from greedy.base.devices import preferred_layout, to_device
from greedy.base.precision import autocast
from greedy.base.ranks import ALONE, Ranks, Shares
from greedy.base.relay import Relay
from greedy.base.seeds import derive_seed, torch_generator
from greedy.cache import (
    LIMITED_WINDOW_ROWS,
    BatchLoader,
    EpochOrder,
    Store,
    StoredBatch,
    row_order,
    window_chunks,
    window_order,
)
from greedy.cache.order import Positions
from greedy.data import Augmentation, Draws, Mixture, Mixup, prepare
from greedy.models.stages import dropped
from greedy.stores.fresh import FreshEpoch, FreshImages

if TYPE_CHECKING:
    from greedy.stores.ring import Ring

Item = TypeVar("Item")
WRITE_ROWS = 1024  # the most rows of a store that are computed at a time


@dataclass
class Waits:
    """The seconds that a process waited for what it read."""

    seconds: float = 0.0

    def timed(self, items: Iterable[Item]) -> Iterator[Item]:
        """Yields the items and counts the seconds until each of them is there."""
        began = time.perf_counter()
        for item in items:
            self.seconds += time.perf_counter() - began
            yield item
            began = time.perf_counter()


@dataclass(frozen=True)
class ImagePreparation:
    """Normalises and augments the raw images of stage 0 when they are read. ``fresh`` reads them
    from the data set where that draws them at random."""

    mean: Sequence[float]
    std: Sequence[float]
    augmentation: Augmentation
    fresh: FreshImages | None = None
    _tables: dict[torch.device, list[Tensor]] = field(default_factory=dict, init=False, repr=False)

    def draw(self, store: Store, seed: int, *key: int | str) -> Draws:
        """Draws the augmentation of all rows of a store for the epoch or view named by ``key``."""
        generator = torch_generator(seed, "augmentation", *key)
        height, width = store.row_shape[1:]
        return self.augmentation.draw(store.rows, height, width, generator)

    def prepare(self, images: Tensor, draws: Draws | None) -> Tensor:
        """Returns raw images (B, C, H, W) normalised and, with ``draws``, augmented."""
        augmentation = self.augmentation if draws else None
        if (device := images.device) not in self._tables:  # copied once, since copying synchronises
            self._tables[device] = [torch.tensor(v, device=device) for v in (self.mean, self.std)]
        mean, std = self._tables[device]
        return prepare(images, mean, std, augmentation, draws)


@dataclass(frozen=True)
class Replayed:
    """Frozen stages that are computed on the fly, for what the store before them gives.

    Attributes:
        stages: in order.
        rows: that they compute at a time.
        precision: that they compute in.
    """

    stages: Sequence[Callable[[Tensor], Tensor]]
    rows: int
    precision: str

    def outputs(self, x: Tensor) -> Tensor:
        """Computes the last stage's output, float32, of inputs (B, *shape)."""
        with torch.no_grad(), autocast(x.device.type, self.precision):
            return replay(self.stages, x, self.rows).float()


@dataclass(frozen=True)
class Source:
    """The store that a stage trains from, and the frozen stages between the two.

    Attributes:
        number: of the stage whose store it is.
        path: of the store.
        stores: the store's splits.
        device: on which batches are computed.
        seed: of the run.
        images: for stage 0 only, whose rows are augmented again in every epoch; other stores hold
            views.
        replayed: the frozen stages after the store's; ``None`` for none.
        held_out: the number of training rows, the last ones, that are left out of epochs.
        ring: replaces views of the training split; ``None`` if they stay.
        in_memory: whether the training split is loaded, so that its rows are shuffled one by one.
        mixup: how the rows of an epoch's batches are mixed; ``None`` if they are not.
        ranks: the processes that train, of which each reads its share of an epoch.
        relay: gives the inputs, which the process before computes; ``None`` if they are read.
        waits: for rows of the training split.
    """

    number: int
    path: Path
    stores: dict[str, Store]
    device: torch.device
    seed: int
    images: ImagePreparation | None = None
    replayed: Replayed | None = None
    held_out: int = 0
    ring: "Ring | None" = None
    in_memory: bool = False
    mixup: Mixup | None = None
    ranks: Ranks = ALONE
    relay: Relay | None = None
    waits: Waits = field(default_factory=Waits, init=False, repr=False)
    _loaded: list[np.ndarray] = field(default_factory=list, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.in_memory and not self._fresh and self.relay is None:
            self._loaded.append(self.stores["train"].load())

    @property
    def _fresh(self) -> FreshImages | None:
        return self.images.fresh if self.images else None

    @property
    def waited(self) -> float:
        """The seconds that training waited for rows, also for those that new views are drawn
        from."""
        return self.waits.seconds + (self.ring.source.waits.seconds if self.ring else 0.0)

    def advance_views(self, epoch: int) -> None:
        """Makes the training split hold the views of an epoch, see ``Ring.advance``."""
        places = self.ring.advance(epoch) if self.ring and self.ranks.leads else ()
        if self.ranks.size > 1:
            places = self.ranks.told(list(places))
        for place in places:
            store = self.stores["train"] = self.stores["train"].reopened()
            if self.in_memory:
                store.load_view(place, self._loaded[0][place])

    def draw_views(self, epoch: int, done: int, rows: int) -> None:
        """Draws what is due of the next view after ``done`` of an epoch's ``rows``."""
        if self.ring and self.ranks.leads:
            self.ring.draw(epoch, done, rows)

    def end_drawing(self, *, finished: bool) -> None:
        """Ends the drawing of views, see ``Ring.close``."""
        if self.ring and self.ranks.leads:
            self.ring.close(finished=finished)

    def epoch_batches(
        self,
        stage: int,
        epoch: int,
        batch_size: int,
        classes_per_batch: int = 0,
        start_batch: int = 0,
    ) -> "EpochBatches":
        """Returns the shuffled batches of one epoch of a stage's training.

        Args:
            stage: its number, which keys the order.
            epoch: from 0.
            batch_size: rows of a batch.
            classes_per_batch: the usual most classes in a batch, 0 for no limit.
            start_batch: the first batch.
        """
        store = self.stores["train"]
        options: dict[str, Any] = {
            "seed": derive_seed(self.seed, "order", stage),
            "epoch": epoch,
            "rows": store.rows - self.held_out,
            "views": store.views,
        }
        if self.in_memory or self._fresh:
            order = row_order(**options)
        else:
            window_rows = {"rows": LIMITED_WINDOW_ROWS} if classes_per_batch else {}
            window = window_chunks(store.chunk_rows, **window_rows)
            order = window_order(**options, chunk_rows=store.chunk_rows, window=window)
        batches = (
            order.limited_batches(store.labels, batch_size, classes_per_batch)
            if classes_per_batch
            else order.batches(batch_size)
        )
        batches = batches[start_batch:]
        shared = [self._shared(order, batch) for batch in batches] if self.ranks.size > 1 else []
        own = batches
        if shared:
            own = [batch[s.computed] for batch, s in zip(batches, shared, strict=True)]
        loader: Iterable[StoredBatch]
        if self.relay is not None:
            loader = self._passed_on(self.relay, [order.rows[positions] for positions in own])
        elif self._fresh:
            rows = [order.rows[positions] for positions in own]
            loader = FreshEpoch(self._fresh, store, rows, stage, epoch)
        else:
            loader = BatchLoader(
                self._loaded[0] if self.in_memory else store,
                store.labels,
                order,
                own,
                pin_memory=self.device.type == "cuda",
            )
        draws = self.images.draw(store, self.seed, stage, epoch) if self.images else None
        mixing = self.mixup.draw(store.rows, self.seed, stage, epoch) if self.mixup else None
        labels = [store.labels[order.rows[batch]] for batch in batches] if shared else []
        return EpochBatches(self, loader, draws, mixing, list(zip(shared, labels, strict=True)))

    def _passed_on(self, relay: Relay, batches: Sequence[np.ndarray]) -> Iterator[StoredBatch]:
        """Yields batches of row numbers whose values are the inputs that the process before
        computes."""
        inputs = relay.receive([len(rows) for rows in batches], training=True)
        for rows, values in zip(batches, inputs, strict=True):
            yield StoredBatch(rows, np.zeros_like(rows), values, self.stores["train"].labels[rows])

    def _shared(self, order: EpochOrder, batch: Positions) -> Shares:
        places = order.shares(batch, self.ranks.size)
        return Shares(self.ranks, [torch.from_numpy(share) for share in places])

    def view_batches(
        self,
        split: str,
        view: int,
        batch_size: int,
        *,
        start: int = 0,
        stop: int | None = None,
    ) -> Iterator["Batch"]:
        """Yields batches of a view's rows ``start`` to ``stop``, in order. Views of stage 0's
        training split are drawn by their number; the test split is not augmented."""
        store = self.stores[split]
        draws = None
        if self.images and split == "train":
            draws = self.images.draw(store, self.seed, "generation", 0, "view", view)
        if self.relay is not None:
            rows = range(start, store.rows if stop is None else stop)
            sizes = [len(rows[i : i + batch_size]) for i in range(0, len(rows), batch_size)]
            batches: Iterator[Tensor] = self.relay.receive(sizes, training=False)
        elif self._fresh and split == "train":
            batches = self.waits.timed(self._fresh.view(store, view, batch_size, start, stop))
        else:
            stored = 0 if draws else view
            batches = map(torch.from_numpy, store.batches(stored, batch_size, start, stop))
        row = start
        for values in batches:
            numbers = np.arange(row, row + len(values))
            yield self.batch(values, store.labels[numbers], numbers, draws)
            row += len(values)

    def batch(
        self, values: Tensor, labels: np.ndarray, numbers: np.ndarray, draws: Draws | None
    ) -> "Batch":
        """Returns stored rows (B, *stored_shape) with their labels (B,) and row ``numbers`` (B,) as
        a batch. ``draws`` are of all rows of the store."""

        def read(rows: slice) -> Tensor:
            return self.inputs(values[rows], draws and draws[numbers[rows]])

        return Batch(self.labels(labels), read)

    def inputs(self, values: np.ndarray | Tensor, draws: Draws | None) -> Tensor:
        """Computes the stage's inputs (B, *shape), float32, from stored rows
        (B, *stored_shape); those that another process has computed stay as they are."""
        if self.relay is not None:
            return torch.as_tensor(values)
        stored = to_device(values, self.device)
        if self.images:
            x = self.images.prepare(stored, draws)
        else:  # laid out as stored, which has fewer bytes than float32
            x = self.stores["train"].encoding.decode(preferred_layout(stored))
        x = preferred_layout(x)
        return self.replayed.outputs(x) if self.replayed else x.float()

    def labels(self, labels: np.ndarray) -> Tensor:
        """Returns labels (B,) on the device."""
        return to_device(labels, self.device)


def replay(stages: Sequence[Callable[[Tensor], Tensor]], x: Tensor, rows: int) -> Tensor:
    """Returns the output of frozen stages for inputs (B, *shape), computed ``rows`` rows at a time,
    since the activations of earlier stages may be much larger than the output."""
    if not stages:
        return x
    parts = [reduce(lambda x, stage: stage(x), stages, part) for part in x.split(rows)]
    return torch.cat(parts) if len(parts) > 1 else parts[0]


@dataclass(frozen=True)
class EpochBatches:
    """The batches of one epoch, to be iterated over once. Of several processes each reads its
    ``shared`` part of each batch, whose labels (B,) go with it."""

    source: Source
    loader: Iterable[StoredBatch]
    draws: Draws | None
    mixing: np.ndarray | None = None
    shared: Sequence[tuple[Shares, np.ndarray]] = ()

    @property
    def rows(self) -> int:
        """The number of rows in the epoch."""
        return self.source.stores["train"].rows - self.source.held_out

    def __iter__(self) -> Generator["Batch"]:
        for number, batch in enumerate(self.source.waits.timed(self.loader)):
            one = self.source.batch(batch.values, batch.labels, batch.rows, self.draws)
            if self.shared:
                shares, labels = self.shared[number]
                one = replace(one, labels=self.source.labels(labels), shares=shares)
            if self.mixing is not None:
                mixture = Mixup.mixture(self.mixing, batch.rows, self.source.device)
                one = replace(one, mixture=mixture)
            yield one


@dataclass(frozen=True)
class Batch:
    """The rows of one step, whose inputs are computed on demand.

    Attributes:
        labels: (B,), on the device.
        read: computes the inputs (rows, *shape) of a slice of the batch on the device, before
            dropout.
        mask: of dropout, (B, ...), by which the inputs are multiplied.
        mixture: how rows and their labels are mixed; ``None`` if they are not.
        shares: of the processes that compute the batch; inputs and mask are then of the rows that
            this one computes, labels of all. ``None`` for one alone.
    """

    labels: Tensor
    read: Callable[[slice], Tensor]
    mask: Tensor | None = None
    mixture: Mixture | None = None
    shares: Shares | None = None

    @property
    def rows(self) -> int:
        """The number of rows that this process computes."""
        return len(self.labels) if self.shares is None else len(self.shares.computed)

    def own(self, mask: Tensor | None) -> Tensor | None:
        """Returns of a mask (B, ...) the rows that this process computes."""
        return mask if mask is None or self.shares is None else self.shares.own(mask)

    def inputs(self, rows: slice = slice(None)) -> Tensor:
        """Computes the stage's inputs (rows, *shape) for a slice of the batch, mixed and after
        dropout."""
        x = self.read(rows)
        if self.mixture is not None:
            x = self.mixture.part(x, self._following(x, rows), rows)
        return dropped(x, self.mask, rows)

    def _following(self, x: Tensor, rows: slice) -> Tensor:
        """Returns the rows that follow those of a slice, ``x``, in the batch."""
        after = rows.indices(len(self.labels))[1] % len(self.labels)
        is_whole = len(x) == len(self.labels)
        return torch.cat((x[1:], x[:1] if is_whole else self.read(slice(after, after + 1))))
