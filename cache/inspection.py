"""Figures about a store's values, from a sample of its chunks."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from greedy.cache.reader import Store

SAMPLE_CHUNKS = 32
BINS = 32


@dataclass(frozen=True)
class StoreInfo:
    """A store in numbers. Those from ``minimum`` on describe the decoded values of a sample.

    Attributes:
        rows: rows in each view.
        views: number of augmented copies of the data set.
        row_shape: the shape of a decoded row, (C, H, W), (T, C) or (F,).
        encoding: one of ``ENCODINGS``.
        compressor: "lz4", "zstd" or "none".
        disk_bytes: size of all files.
        bytes_per_value: ``disk_bytes`` over the activations of all views.
        sampled_rows: rows in the sample, over all views.
        minimum: smallest value.
        maximum: largest value.
        zeros: share of values equal to 0, from 0 to 1.
        negatives: share of values below 0, from 0 to 1.
        histogram: share of the values in each of ``BINS`` bins of equal width.
        edges: the edges of the bins, one more than there are bins.
    """

    rows: int
    views: int
    row_shape: tuple[int, ...]
    encoding: str
    compressor: str
    disk_bytes: int
    bytes_per_value: float
    sampled_rows: int
    minimum: float
    maximum: float
    zeros: float
    negatives: float
    histogram: tuple[float, ...]
    edges: tuple[float, ...]


def store_info(store: Store) -> StoreInfo:
    """Measures a store: its sizes, and the values in at most ``SAMPLE_CHUNKS`` chunks, spread over
    all views.

    Reads the sample twice and holds one chunk at a time.

    Raises:
        DamagedStore: naming the file and the chunk.
    """
    low, high = np.inf, -np.inf
    rows = zeros = negatives = 0
    for values in _sample(store):
        low, high = min(low, float(values.min())), max(high, float(values.max()))
        rows += len(values)
        zeros += int(np.count_nonzero(values == 0))
        negatives += int(np.count_nonzero(values < 0))
    edges = np.histogram_bin_edges(np.array([low, high], np.float64), BINS)
    counts = np.zeros(BINS, np.int64)
    for values in _sample(store):
        counts += np.histogram(values, edges)[0]
    sampled = rows * store.encoding.row_size
    return StoreInfo(
        rows=store.rows,
        views=store.views,
        row_shape=store.row_shape,
        encoding=store.encoding.name,
        compressor=store.compressor,
        disk_bytes=store.disk_bytes,
        bytes_per_value=store.disk_bytes / (store.views * store.rows * store.encoding.row_size),
        sampled_rows=rows,
        minimum=float(low),
        maximum=float(high),
        zeros=zeros / sampled,
        negatives=negatives / sampled,
        histogram=tuple((counts / sampled).tolist()),
        edges=tuple(edges.tolist()),
    )


def _sample(store: Store) -> Iterator[NDArray[np.float32]]:
    chunks = store.layout.chunks
    total = store.views * chunks
    for number in np.linspace(0, total - 1, min(total, SAMPLE_CHUNKS)).round().astype(int):
        view, chunk = divmod(int(number), chunks)
        yield store.encoding.decode_array(store.read_chunk(view, chunk))
