"""Reading a store: chunks, ranges of rows, everything, or batches in sequence."""

from collections.abc import Iterator
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from greedy.cache import shards
from greedy.cache.encodings import Encoding
from greedy.cache.errors import ADVICE, DamagedStore, StoreError
from greedy.cache.layout import Layout
from greedy.cache.metadata import StoreMetadata, parse_metadata
from greedy.cache.sources import open_source
from greedy.cache.threads import background, in_order

if TYPE_CHECKING:
    from greedy.cache.chunk_cache import ChunkCache
    from greedy.cache.sources import Location

_CHUNKS_AHEAD = 4

_Shard = tuple[str, NDArray[np.uint64]]  # its file and its index


class Store:
    """An activation store, opened for reading; safe to use from several threads.

    Every chunk's checksum is verified on every read. Values come in their stored form;
    ``encoding`` decodes them.

    Args:
        location: a directory, which may stand for a store in object storage; the URL of one; or a
            store of zarr-python.
        advice: what to do about damage; it ends the messages of ``DamagedStore``.
        kept: the cache of chunks that are read from object storage.

    Attributes:
        layout: how rows are divided into chunks and shards.
        encoding: how values are stored.
        compressor: "lz4", "zstd" or "none".
        metadata: all of these.
        labels: int64 (rows,), the classes.
        index: int64 (rows,), each row's number in the original data set.

    Raises:
        StoreError: there is no store at ``location``, or none that this version reads.
        DamagedStore: its labels or index are missing, or these or its metadata are damaged.
        UnreachableStore: it is in object storage that does not answer, as may any later read.
    """

    layout: Layout
    encoding: Encoding
    compressor: str
    metadata: StoreMetadata
    labels: NDArray[np.int64]
    index: NDArray[np.int64]

    def __init__(
        self, location: "Location", advice: str = ADVICE, kept: "ChunkCache | None" = None
    ) -> None:
        self._location = location
        self._kept = kept
        self._source = open_source(location, kept)
        self.advice = advice
        try:
            self._open()
        except DamagedStore as error:
            raise self._advised(error) from error

    def _open(self) -> None:
        group = self._source.whole("zarr.json")
        activations = self._source.whole("activations/zarr.json")
        if group is None or activations is None:
            raise StoreError(f"{self._source} is not a finished activation store; write it first")
        self.metadata = parse_metadata(group, activations, str(self._source))
        self.layout = self.metadata.layout
        self.encoding = self.metadata.encoding
        self.compressor = self.metadata.compressor
        self.labels = self._side_array("labels")
        self.index = self._side_array("index")
        self._shards: dict[tuple[int, int], _Shard] = {}

    def reopened(self) -> "Store":
        """Opens the store again, after a view was replaced."""
        return Store(self._location, self.advice, self._kept)

    @property
    def requests(self) -> int:
        """The number of reads that it pays to have under way at a time."""
        return self._source.requests

    @property
    def rows(self) -> int:
        """Number of rows in each view."""
        return self.layout.rows

    @property
    def views(self) -> int:
        """Number of augmented copies of the data set."""
        return self.layout.views

    @property
    def row_shape(self) -> tuple[int, ...]:
        """The shape of a decoded row."""
        return self.encoding.row_shape

    @property
    def chunk_rows(self) -> int:
        """Number of rows in a chunk."""
        return self.layout.chunk_rows

    @property
    def stored_bytes(self) -> int:
        """Bytes of all views in stored form, uncompressed, as ``load`` holds them."""
        return self.views * self.rows * self.encoding.stored_row_bytes

    @cached_property
    def disk_bytes(self) -> int:
        """Size of all the store's files in bytes."""
        return self._source.total_bytes()

    def read_chunk(self, view: int, chunk: int, out: NDArray[Any] | None = None) -> NDArray[Any]:
        """Reads the first rows of a chunk, (n, *stored_shape), without padding.

        Args:
            out: (n, *stored_shape), filled and returned; by default a new array of all rows.

        Raises:
            DamagedStore: naming the file and the chunk.
        """
        if not (0 <= view < self.views and 0 <= chunk < self.layout.chunks):
            raise IndexError(f"chunk {chunk} of view {view} is outside the store")
        shape = self.metadata.chunk_shape
        if out is not None and out.shape == shape and out.flags.c_contiguous:
            self._decode(view, chunk, out)
            return out
        whole = np.empty(shape, self.encoding.stored_dtype)
        self._decode(view, chunk, whole)
        if out is None:
            return whole[: self.layout.rows_in(chunk)]
        out[:] = whole[: len(out)]
        return out

    def read_rows(self, view: int, start: int, stop: int) -> NDArray[Any]:
        """Reads rows ``start`` to ``stop`` of a view, (stop - start, *stored_shape).

        Raises:
            DamagedStore: naming the file and the chunk.
        """
        self._check_range(start, stop)
        rows = np.empty((stop - start, *self.encoding.stored_shape), self.encoding.stored_dtype)
        for chunk in range(start // self.chunk_rows, -(-stop // self.chunk_rows)):
            first = chunk * self.chunk_rows
            skip = max(start - first, 0)
            target = rows[first + skip - start : first + self.chunk_rows - start]
            if skip:
                target[:] = self.read_chunk(view, chunk)[skip : skip + len(target)]
            else:
                self.read_chunk(view, chunk, target)
        return rows

    def load(self, rows: int | None = None) -> NDArray[Any]:
        """Reads the first ``rows`` rows of all views, by default all: (views, rows, *stored_shape).

        Raises:
            DamagedStore: naming the file and the chunk.
        """
        rows = self.rows if rows is None else rows
        self._check_range(0, rows)
        chunks = [
            (view, chunk)
            for view in range(self.views)
            for chunk in range(-(-rows // self.chunk_rows))
        ]
        try:  # a missing shard is found before memory is allocated
            for view, chunk in chunks:
                if chunk % self.layout.shard_chunks == 0:
                    self._span(self._shard(view, chunk), view, chunk)
        except DamagedStore as error:
            raise self._advised(error) from error
        loaded = np.empty(
            (self.views, rows, *self.encoding.stored_shape), self.encoding.stored_dtype
        )
        for view in range(self.views):
            self.load_view(view, loaded[view])
        return loaded

    def load_view(self, view: int, out: NDArray[Any]) -> None:
        """Reads the first rows of a view into ``out`` (n, *stored_shape).

        Raises:
            DamagedStore: naming the file and the chunk.
        """
        self._check_range(0, len(out))
        step = self.chunk_rows
        jobs = (
            partial(self.read_chunk, view, chunk, out[chunk * step : (chunk + 1) * step])
            for chunk in range(-(-len(out) // step))
        )
        with background(self.requests) as pool:
            for _ in in_order(pool, jobs, 2 * self.requests):
                pass

    def batches(
        self, view: int, size: int, start: int = 0, stop: int | None = None
    ) -> Iterator[NDArray[Any]]:
        """Yields rows ``start`` to ``stop`` of a view in order, ``size`` at a time, the last batch
        shorter.

        Background threads read ahead; they end with the iterator.

        Raises:
            DamagedStore: naming the file and the chunk.
        """
        stop = self.rows if stop is None else stop
        self._check_range(start, stop)
        chunks = range(start // self.chunk_rows, -(-stop // self.chunk_rows))
        with background(self.requests // 2) as pool:
            ahead = max(_CHUNKS_AHEAD, self.requests)
            reads = in_order(
                pool, (partial(self.read_chunk, view, chunk) for chunk in chunks), ahead
            )
            rest = next(reads)[start % self.chunk_rows :]
            for first in range(start, stop, size):
                wanted = min(size, stop - first)
                pieces = [rest[:wanted]]
                while wanted > len(rest):
                    wanted -= len(rest)
                    rest = next(reads)
                    pieces.append(rest[:wanted])
                rest = rest[wanted:]
                yield np.concatenate(pieces) if len(pieces) > 1 else pieces[0]

    def _advised(self, error: DamagedStore) -> DamagedStore:
        """Returns the same error with this store's advice."""
        return DamagedStore(error.problem, self.advice)

    def _decode(self, view: int, chunk: int, out: NDArray[Any]) -> None:
        try:
            shard = self._shard(view, chunk)
            key, where, offset, size = self._span(shard, view, chunk)
            try:
                self._read(key, where, offset, size, out)
            except DamagedStore:
                # Another thread may have opened a new shard since this one had its index.
                current = self._shards.pop((view, chunk // self.layout.shard_chunks), None)
                if not self._source.forget(key, offset) and current is shard:
                    raise
                self._read(*self._span(self._shard(view, chunk), view, chunk), out)
        except DamagedStore as error:
            raise self._advised(error) from error

    def _read(self, key: str, where: str, offset: int, size: int, out: NDArray[Any]) -> None:
        data = self._source.part(key, offset, size)
        if data is None:
            raise DamagedStore(f"{where} lies beyond the end of its shard")
        shards.decode_chunk(data, self.compressor, out, where)

    def _span(self, shard: _Shard, view: int, chunk: int) -> tuple[str, str, int, int]:
        """Returns a chunk's file, its name for messages, and its offset and size in the file."""
        key, index = shard
        slot = chunk % self.layout.shard_chunks
        where = f"{self._source}/{key}: chunk {chunk} of view {view}"
        entry = shards.chunk_span(index, slot, self.metadata.chunk_bytes, self.compressor, where)
        return key, where, *entry

    def _shard(self, view: int, chunk: int) -> _Shard:
        """Returns the file and the index of a chunk's shard; the chunk is named where they are
        damaged."""
        shard = chunk // self.layout.shard_chunks
        if (opened := self._shards.get((view, shard))) is not None:
            return opened
        key, slots = self.metadata.shard_key(view, shard), self.layout.shard_chunks
        where = f"{self._source}/{key}: chunk {chunk} of view {view}"
        tail = self._source.tail(key, shards.index_bytes(slots))
        if tail is None:
            raise DamagedStore(f"{where} is in a missing shard")
        opened = self._shards[view, shard] = key, shards.parse_index(tail, slots, where)
        return opened

    def _side_array(self, name: str) -> NDArray[np.int64]:
        where = f"{self._source}/{name}"
        data = self._source.whole(f"{name}/c.0")
        if data is None:
            raise DamagedStore(f"{where} is missing")
        values = shards.without_crc(np.frombuffer(data, np.uint8), where)
        if values.nbytes != 8 * self.rows:
            raise DamagedStore(f"{where} does not have {self.rows} rows")
        return values.view("<i8").astype(np.int64)

    def _check_range(self, start: int, stop: int) -> None:
        if not 0 <= start < stop <= self.rows:
            raise IndexError(f"rows {start} to {stop} are not a part of the {self.rows} stored")
