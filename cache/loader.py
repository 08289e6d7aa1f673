"""Batches of one epoch, read before training asks for them."""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from greedy.cache.order import EpochOrder, Positions, WindowOrder
from greedy.cache.reader import Store
from greedy.cache.threads import background

if TYPE_CHECKING:
    import torch

_BATCHES_AHEAD = 2


@dataclass(frozen=True, eq=False)
class StoredBatch:
    """The rows of one training step, as a store holds them.

    Attributes:
        rows: int64 (B,), their numbers in the store.
        views: int64 (B,), the view that each was read from.
        values: (B, *stored_shape), in stored form, on the CPU. For an asynchronous copy to a GPU,
            copy this tensor or a slice of it: torch keeps the page-locked memory of tensors
            that it made until such a copy is done, but not of other tensors over the same bytes.
        labels: int64 (B,), their classes.
    """

    rows: NDArray[np.int64]
    views: NDArray[np.int64]
    values: "torch.Tensor"
    labels: NDArray[np.int64]


class BatchLoader:
    """Iterates over the batches of one epoch; values are gathered in background threads.

    Leaving a loop early ends the threads. From a store two windows are held in memory: the one
    in use, and the next, which is read meanwhile.

    Args:
        source: a store, read in windows, or the array that ``Store.load`` returned.
        labels: int64 (rows,), the classes of the source's rows.
        order: the order of the epoch; a ``WindowOrder`` for a store.
        batches: positions in ``order`` of every batch, from its ``batches`` or ``limited_batches``,
            or some of them. Chunks with none of them are not read.
        threads: number of threads that read chunks, by default as many as pay; one more gathers
            batches.
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
        threads: int | None = None,
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
        self._threads = threads or (source.requests if isinstance(source, Store) else 1)
        self._pin_memory = pin_memory

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[StoredBatch]:
        with background(1) as gatherer, background(self._threads) as readers:
            memory = self._open(readers)
            pending: deque[Future[StoredBatch]] = deque()
            upcoming = deque(self._batches)
            for positions in self._batches:
                memory.advance(positions)
                while upcoming and len(pending) <= _BATCHES_AHEAD and memory.holds(upcoming[0]):
                    batch = upcoming.popleft()
                    out = self._buffer(len(batch))
                    pending.append(gatherer.submit(self._gather, memory, batch, out))
                yield pending.popleft().result()

    def _open(self, readers: ThreadPoolExecutor) -> "_Resident | _Windows":
        if not isinstance(self._source, Store):
            return _Resident(self._source, self._order)
        assert isinstance(self._order, WindowOrder)
        return _Windows(self._source, self._order, self._batches, readers)

    def _buffer(self, rows: int) -> "torch.Tensor":
        if isinstance(self._source, Store):
            encoding = self._source.encoding
            shape, dtype = (rows, *encoding.stored_shape), encoding.stored_dtype
        else:
            shape, dtype = (rows, *self._source.shape[2:]), self._source.dtype
        import torch  # noqa: PLC0415 - takes seconds to import

        if not self._pin_memory:
            return torch.from_numpy(np.empty(shape, dtype))
        torch_dtype = torch.from_numpy(np.empty(0, dtype)).dtype
        return torch.empty(shape, dtype=torch_dtype, pin_memory=True)

    def _gather(
        self, memory: "_Resident | _Windows", positions: Positions, out: "torch.Tensor"
    ) -> StoredBatch:
        memory.gather(positions, out.numpy())
        rows = self._order.rows[positions]
        return StoredBatch(rows, self._order.views[positions], out, self._labels[rows])


class _Resident:
    """A store's values in memory, (views, rows, ...)."""

    def __init__(self, values: NDArray[Any], order: EpochOrder) -> None:
        self._flat = values.reshape(-1, *values.shape[2:])
        self._flat_rows = order.views * values.shape[1] + order.rows

    def advance(self, positions: Positions) -> None:
        """Does nothing: all values are in memory."""

    def holds(self, positions: Positions) -> bool:
        return True

    def gather(self, positions: Positions, out: NDArray[Any]) -> None:
        _take(self._flat, self._flat_rows[positions], out)


class _Windows:
    """The windows of a store that are in memory or being read, but for chunks that no batch has
    rows of."""

    def __init__(
        self,
        store: Store,
        order: WindowOrder,
        batches: Sequence[Positions],
        readers: ThreadPoolExecutor,
    ) -> None:
        self._store = store
        self._order = order
        self._readers = readers
        sizes = np.diff(order.ends, prepend=0)
        self._window_rows = int(sizes.max()) * order.chunk_rows
        slots = np.empty(len(order.chunks), np.int64)
        slots[order.chunks] = np.arange(len(order.chunks)) - np.repeat(order.ends - sizes, sizes)
        chunks, rows = np.divmod(order.rows, order.chunk_rows)
        self._buffer_rows = slots[chunks] * order.chunk_rows + rows
        self._used = np.zeros(len(order.chunks), bool)
        for positions in batches:
            self._used[chunks[positions]] = True
        self._windows: dict[int, tuple[NDArray[Any], list[Future[NDArray[Any]]]]] = {}
        self._spares: list[NDArray[Any]] = []

    def advance(self, positions: Positions) -> None:
        """Releases the windows before those of a batch, and starts reading these and the next."""
        windows = self._windows_of(positions)
        first = int(windows.min())
        for window in [window for window in self._windows if window < first]:
            self._spares.append(self._windows.pop(window)[0])
        last = min(max(first + 1, int(windows.max())), len(self._order.ends) - 1)
        for window in range(first, last + 1):
            if window not in self._windows:
                self._windows[window] = self._read(window)

    def holds(self, positions: Positions) -> bool:
        return int(self._windows_of(positions).max()) in self._windows

    def gather(self, positions: Positions, out: NDArray[Any]) -> None:
        windows, rows = self._windows_of(positions), self._buffer_rows[positions]
        for window in np.unique(windows).tolist():
            buffer, reads = self._windows[window]
            for read in reads:
                read.result()
            inside = windows == window
            if inside.all():
                _take(buffer, rows, out)
            else:
                out[inside] = buffer[rows[inside]]

    def _windows_of(self, positions: Positions) -> NDArray[np.int64]:
        return np.searchsorted(self._order.row_ends, positions, side="right")

    def _read(self, window: int) -> tuple[NDArray[Any], list[Future[NDArray[Any]]]]:
        order, encoding = self._order, self._store.encoding
        shape = (self._window_rows, *encoding.stored_shape)
        buffer = self._spares.pop() if self._spares else np.empty(shape, encoding.stored_dtype)
        start = int(order.ends[window - 1]) if window else 0
        reads = []
        for slot, number in enumerate(range(start, int(order.ends[window]))):
            chunk = int(order.chunks[number])
            if not self._used[chunk]:
                continue
            used = min(order.chunk_rows, len(order.rows) - chunk * order.chunk_rows)
            target = buffer[slot * order.chunk_rows :][:used]
            view = int(order.chunk_views[number])
            reads.append(self._readers.submit(self._store.read_chunk, view, chunk, target))
        return buffer, reads


def _take(values: NDArray[Any], rows: NDArray[np.int64], out: NDArray[Any]) -> None:
    # Any mode but "raise" writes into ``out`` directly, without a temporary copy.
    np.take(values, rows, axis=0, out=out, mode="clip")
