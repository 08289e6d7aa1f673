"""Writing a store: rows in order, encoded and compressed in the background."""

from collections import deque
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from greedy.cache.encodings import Encoding
from greedy.cache.errors import StoreError
from greedy.cache.layout import Layout
from greedy.cache.metadata import SIDE_ARRAYS, StoreMetadata
from greedy.cache.shards import (
    COMPRESSORS,
    ShardWriter,
    encode_chunk,
    store_digest,
    with_crc,
)
from greedy.cache.targets import open_target
from greedy.cache.threads import background
from greedy.cache.urls import LOCATION


@dataclass(frozen=True)
class StoreSummary:
    """The size and the digest of a finished store.

    Attributes:
        disk_bytes: size of all files.
        values: activations stored, over all views.
        digest: BLAKE2b over labels, index and the digest of every shard, in hexadecimal.
        shards: the BLAKE2b digest of every shard, view by view, in hexadecimal.
    """

    disk_bytes: int
    values: int
    digest: str
    shards: tuple[str, ...]


class StoreWriter:
    """Writes one store; a context manager that finishes the store when it is left without error.

    The group's ``zarr.json`` comes last, so an unfinished store is never taken for a whole one.
    Memory: a few chunks for each thread. The bytes do not depend on ``threads``, nor on how rows
    are divided over calls of ``append``.

    Args:
        path: the directory to make; must not hold files. If it stands for a store in object storage
            (``urls.put_elsewhere``), that is written, and up to two shards are on the local disk.
        rows: number of rows in each view.
        views: number of augmented copies of the data set.
        encoding: how values are stored.
        compressor: "lz4", "zstd" or "none".
        labels: integers (rows,), the classes. They are read when the store is finished, so an int64
            array may be filled while rows are appended.
        index: integers (rows,), each row's number in the original data set; read at the end too.
        encoded: whether ``append`` gets values already in stored form (raw images).
        threads: number of threads that encode and compress; one more writes.
        layout: by default that of ``Layout.fit``.
        resume: keep the finished shards of an interrupted writer of the same rows.

    Attributes:
        summary: set when the store is finished.
        appended: number of rows appended so far, over all views. With ``resume``, those that were
            kept: append the rows after them.

    Raises:
        StoreError: ``path`` holds files, or the arguments do not fit together.
    """

    summary: StoreSummary

    def __init__(
        self,
        path: Path,
        *,
        rows: int,
        views: int,
        encoding: Encoding,
        compressor: str,
        labels: NDArray[Any],
        index: NDArray[Any],
        encoded: bool = False,
        threads: int = 2,
        layout: Layout | None = None,
        resume: bool = False,
    ) -> None:
        if compressor not in COMPRESSORS:
            raise StoreError(
                f"unknown compressor {compressor!r}; choose from {', '.join(COMPRESSORS)}"
            )
        if rows < 1 or views < 1:
            raise StoreError(f"a store needs rows and views, not {views} views of {rows} rows")
        if labels.shape != (rows,) or index.shape != (rows,):
            raise StoreError(f"labels and index must have one entry for each of {rows} rows")
        if not resume and path.exists() and {f.name for f in path.iterdir()} - {LOCATION}:
            raise StoreError(f"{path} already holds files; remove them first")
        self._path = path
        self._layout = layout or Layout.fit(views, rows, encoding)
        self._metadata = StoreMetadata(self._layout, encoding, compressor)
        self._side_arrays = dict(
            zip(SIDE_ARRAYS, (np.asarray(labels, "<i8"), np.asarray(index, "<i8")), strict=True)
        )
        self._encoded = encoded
        self._dtype = encoding.stored_dtype if encoded else np.dtype(np.float32)
        self._row_shape = encoding.stored_shape if encoded else encoding.row_shape
        self._threads = threads
        self.appended = 0
        self._resume = resume
        self._chunk = np.empty(0)
        self._pending: deque[Future[None]] = deque()
        self._shard: ShardWriter | None = None
        self._digests: list[bytes] = []
        self._broken = False

    def __enter__(self) -> Self:
        (self._path / "activations").mkdir(parents=True, exist_ok=True)
        self._target = open_target(self._path)
        if self._resume:
            self._keep_whole_shards()
        with ExitStack() as stack:
            stack.callback(self._discard)
            self._uploader = stack.enter_context(background(1))
            # One thread writes, in order; it is ended last, since it waits for the others.
            self._files = stack.enter_context(background(1))
            self._encoders = stack.enter_context(background(self._threads))
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with self._stack:
            if error is None:
                self.finish()
            else:
                self._broken = True

    def append(self, values: NDArray[Any]) -> None:
        """Adds the next rows, any number: all of view 0 in order, then of view 1, and so on.

        Args:
            values: float32 (n, *row_shape), or (n, *stored_shape) where ``encoded``; copied.

        Raises:
            StoreError: type, shape or number of rows do not fit.
            NonFiniteActivation: for these or for earlier rows, which are encoded in the background.
        """
        if values.dtype != self._dtype or values.shape[1:] != self._row_shape:
            raise StoreError(
                f"rows must be {self._dtype} {self._row_shape}, "
                f"not {values.dtype} {values.shape[1:]}"
            )
        if self.appended + len(values) > self._layout.views * self._layout.rows:
            raise StoreError(f"the store takes {self._expected()}, more were appended")
        while len(values):
            view, row = divmod(self.appended, self._layout.rows)
            chunk, filled = divmod(row, self._layout.chunk_rows)
            if not filled:
                shape = (self._layout.rows_in(chunk), *self._row_shape)
                self._chunk = np.empty(shape, self._dtype)
            taken = min(len(self._chunk) - filled, len(values))
            self._chunk[filled : filled + taken] = values[:taken]
            self.appended += taken
            values = values[taken:]
            if filled + taken == len(self._chunk):
                self._submit(view, chunk)

    def finish(self) -> StoreSummary:
        """Writes the last rows, checks that none is missing, and describes the store.

        Raises:
            StoreError: rows are missing.
            NonFiniteActivation: for earlier rows, which are encoded in the background.
        """
        if hasattr(self, "summary"):
            return self.summary
        self._wait(0)
        layout = self._layout
        if len(self._digests) != layout.views * layout.shards:
            raise StoreError(f"the store takes {self._expected()}, {self.appended} rows came")
        self._target.wait()
        for name, array in self._side_arrays.items():
            self._target.write(f"{name}/c.0", with_crc(array.tobytes()))
        for name, document in self._metadata.documents().items():
            self._target.write(name, document)
        self.summary = StoreSummary(
            disk_bytes=self._target.source.total_bytes(),
            values=layout.views * layout.rows * self._metadata.encoding.row_size,
            digest=store_digest(self._side_arrays.values(), self._digests),
            shards=tuple(shard.hex() for shard in self._digests),
        )
        return self.summary

    def _submit(self, view: int, chunk: int) -> None:
        self._wait(self._threads + 1)
        encoded = self._encoders.submit(self._encode, self._chunk)
        self._pending.append(self._files.submit(self._write, encoded, view, chunk))

    def _wait(self, left: int) -> None:
        """Waits until at most ``left`` chunks are unwritten, and raises background errors."""
        while len(self._pending) > left:
            self._pending.popleft().result()

    def _encode(self, values: NDArray[Any]) -> bytes:
        return encode_rows(values, self._metadata, self._encoded)

    def _write(self, encoded: Future[bytes], view: int, chunk: int) -> None:
        if self._broken:  # nothing may follow a chunk that failed
            return
        try:
            data = encoded.result()
            shard = chunk // self._layout.shard_chunks
            if self._shard is None:
                path = self._path / self._metadata.shard_key(view, shard)
                self._shard = ShardWriter(path, self._layout.shard_chunks)
            self._shard.append(data)
            if self._shard.written == self._layout.chunks_in(shard):
                digest = self._shard.close()
                self._shard = None
                self._target.keep(self._metadata.shard_key(view, shard), digest, self._uploader)
                self._digests.append(digest)
        except BaseException:
            self._broken = True
            raise

    def _keep_whole_shards(self) -> None:
        layout = self._layout
        self._target.remove("zarr.json")
        for view in range(layout.views):
            for shard in range(layout.shards):
                digest = self._target.kept(self._metadata, view, shard)
                if digest is None:
                    return
                self._digests.append(digest)
                rows = min((shard + 1) * layout.shard_rows, layout.rows)
                self.appended = view * layout.rows + rows

    def _discard(self) -> None:
        if self._shard is not None:
            self._shard.discard()

    def _expected(self) -> str:
        return f"{self._layout.views} views of {self._layout.rows} rows"


def encode_rows(values: NDArray[Any], metadata: StoreMetadata, encoded: bool = False) -> bytes:
    """Returns the bytes of a chunk with the given rows, float32 (n, *row_shape), or in stored form
    if ``encoded``."""
    stored = values if encoded else metadata.encoding.encode(values)
    padding = metadata.layout.chunk_rows - len(stored)
    if padding:
        stored = np.pad(stored, [(0, padding)] + [(0, 0)] * (stored.ndim - 1))
    return encode_chunk(stored, metadata.compressor)
