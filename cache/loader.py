"""Batches of one epoch, read ahead of the training that consumes them."""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .order import EpochOrder, Positions, WindowOrder
from .reader import Store
from .threads import background

if TYPE_CHECKING:
    import torch

_BATCHES_AHEAD = 2


@dataclass(frozen=True, eq=False)
class Batch:
    """Rows of one step.

    Attributes:
        rows: int64 (B,), in the store.
        views: int64 (B,).
        values: (B, *stored_shape), in stored form, on the CPU. Whoever copies them to a GPU without
            waiting copies this tensor or a slice of it: torch keeps page-locked memory until such a
            copy is done if it made the tensor, and not if it was made of the same bytes again.
        labels: int64 (B,).
    """

    rows: NDArray[np.int64]
    views: NDArray[np.int64]
    values: "torch.Tensor"
    labels: NDArray[np.int64]


class BatchLoader:
    """Iterates over the `Batch`es of one epoch; values are gathered in background threads.

    Leaving a loop early ends the threads. From a store two windows are held in memory, the one
    in use and the next, each read while the one before it is consumed.

    Args:
        source: a store, read in windows, or what `Store.load` returned.
        labels: int64, of the source's rows.
        order: of the epoch; a `WindowOrder` for a store.
        batches: positions in `order` of every batch, from its `batches` or `limited_batches`.
        start_batch: where to begin; nothing before it is read.
        threads: that read chunks; one more gathers batches.
        pin_memory: put values in page-locked memory, for asynchronous copies to a GPU.

    Raises:
        ValueError: the order does not fit the source.
        DamagedStore: while iterating, naming the file and the chunk.
    """

    def __init__(
        self,
        source: Store | NDArray[Any],
        labels: NDArray[np.int64],
        order: EpochOrder,
        batches: list[Positions],
        *,
        start_batch: int = 0,
        threads: int = 2,
        pin_memory: bool = False,
    ) -> None:
        rows = source.rows if isinstance(source, Store) else source.shape[1]
        if len(order.rows) > rows:
            raise ValueError(f"the order is of {len(order.rows)} rows, the source has {rows}")
        if isinstance(source, Store) and (
            not isinstance(order, WindowOrder) or order.chunk_rows != source.chunk_rows
        ):
            raise ValueError("a store is read in the order of its own chunks: use window_order")
        self._source = source
        self._labels = labels
        self._order = order
        self._batches = batches
        self._start = start_batch
        self._threads = threads
        self._pin_memory = pin_memory

    def __len__(self) -> int:
        return len(self._batches) - self._start

    def __iter__(self) -> Iterator[Batch]:
        with background(1) as gatherer, background(self._threads) as readers:
            memory = self._open(readers)
            pending: deque[Future[Batch]] = deque()
            later = deque(self._batches[self._start :])
            for positions in self._batches[self._start :]:
                memory.advance(positions)
                while later and len(pending) <= _BATCHES_AHEAD and memory.holds(later[0]):
                    ahead = later.popleft()
                    out = self._buffer(len(ahead))
                    pending.append(gatherer.submit(self._gather, memory, ahead, out))
                yield pending.popleft().result()

    def _open(self, readers: ThreadPoolExecutor) -> "_Resident | _Windows":
        if not isinstance(self._source, Store):
            return _Resident(self._source, self._order)
        assert isinstance(self._order, WindowOrder)
        return _Windows(self._source, self._order, readers)

    def _buffer(self, rows: int) -> "torch.Tensor":
        if isinstance(self._source, Store):
            encoding = self._source.encoding
            shape, dtype = (rows, *encoding.stored_shape), encoding.stored_dtype
        else:
            shape, dtype = (rows, *self._source.shape[2:]), self._source.dtype
        import torch  # noqa: PLC0415 - takes seconds, which commands that only look are spared

        if not self._pin_memory:
            return torch.from_numpy(np.empty(shape, dtype))
        same = torch.from_numpy(np.empty(0, dtype)).dtype
        return torch.empty(shape, dtype=same, pin_memory=True)

    def _gather(
        self, memory: "_Resident | _Windows", positions: Positions, out: "torch.Tensor"
    ) -> Batch:
        memory.gather(positions, out.numpy())
        rows = self._order.rows[positions]
        return Batch(rows, self._order.views[positions], out, self._labels[rows])


class _Resident:
    """A store's values in memory, (views, rows, ...)."""

    def __init__(self, values: NDArray[Any], order: EpochOrder) -> None:
        self._flat = values.reshape(-1, *values.shape[2:])
        self._places = order.views * values.shape[1] + order.rows

    def advance(self, positions: Positions) -> None:
        """Everything is already here."""

    def holds(self, positions: Positions) -> bool:
        return True

    def gather(self, positions: Positions, out: NDArray[Any]) -> None:
        _take(self._flat, self._places[positions], out)


class _Windows:
    """The windows of a store that are in memory or on their way."""

    def __init__(self, store: Store, order: WindowOrder, readers: ThreadPoolExecutor) -> None:
        self._store = store
        self._order = order
        self._readers = readers
        sizes = np.diff(order.ends, prepend=0)
        self._buffer_rows = int(sizes.max()) * order.chunk_rows
        slots = np.empty(len(order.chunks), np.int64)
        slots[order.chunks] = np.arange(len(order.chunks)) - np.repeat(order.ends - sizes, sizes)
        chunks, places = np.divmod(order.rows, order.chunk_rows)
        self._places = slots[chunks] * order.chunk_rows + places
        self._live: dict[int, tuple[NDArray[Any], list[Future[NDArray[Any]]]]] = {}
        self._spare: list[NDArray[Any]] = []

    def advance(self, positions: Positions) -> None:
        """Let go of the windows before a batch, and read its own and the next one."""
        windows = self._windows_of(positions)
        first = int(windows.min())
        for window in [window for window in self._live if window < first]:
            self._spare.append(self._live.pop(window)[0])
        last = min(max(first + 1, int(windows.max())), len(self._order.ends) - 1)
        for window in range(first, last + 1):
            if window not in self._live:
                self._live[window] = self._read(window)

    def holds(self, positions: Positions) -> bool:
        return int(self._windows_of(positions).max()) in self._live

    def gather(self, positions: Positions, out: NDArray[Any]) -> None:
        windows, places = self._windows_of(positions), self._places[positions]
        for window in np.unique(windows).tolist():
            buffer, reads = self._live[window]
            for read in reads:
                read.result()
            inside = windows == window
            if inside.all():
                _take(buffer, places, out)
            else:
                out[inside] = buffer[places[inside]]

    def _windows_of(self, positions: Positions) -> NDArray[np.int64]:
        return np.searchsorted(self._order.row_ends, positions, side="right")

    def _read(self, window: int) -> tuple[NDArray[Any], list[Future[NDArray[Any]]]]:
        order, encoding = self._order, self._store.encoding
        shape = (self._buffer_rows, *encoding.stored_shape)
        buffer = self._spare.pop() if self._spare else np.empty(shape, encoding.stored_dtype)
        start = int(order.ends[window - 1]) if window else 0
        reads = []
        for slot, number in enumerate(range(start, int(order.ends[window]))):
            chunk = int(order.chunks[number])
            used = min(order.chunk_rows, len(order.rows) - chunk * order.chunk_rows)
            target = buffer[slot * order.chunk_rows :][:used]
            view = int(order.chunk_views[number])
            reads.append(self._readers.submit(self._store.read_chunk, view, chunk, target))
        return buffer, reads


def _take(rows: NDArray[Any], places: NDArray[np.int64], out: NDArray[Any]) -> None:
    # Any mode but "raise" writes into `out` without a copy between.
    np.take(rows, places, axis=0, out=out, mode="clip")
