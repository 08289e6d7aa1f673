"""Repair of the damaged parts of a store; everything else stays as it is."""

from collections.abc import Callable, Collection
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from greedy.cache import shards
from greedy.cache.encodings import Encoding
from greedy.cache.errors import StoreError, UnreachableStore
from greedy.cache.layout import Layout
from greedy.cache.metadata import SIDE_ARRAYS, StoreMetadata, parse_metadata
from greedy.cache.sources import open_source
from greedy.cache.targets import open_target
from greedy.cache.verification import shard_damage
from greedy.cache.writer import encode_rows


def read_metadata(path: Path) -> StoreMetadata | None:
    """Reads a store's metadata; returns ``None`` if they are damaged or missing."""
    try:
        source = open_source(path)
        group, array = source.whole("zarr.json"), source.whole("activations/zarr.json")
        return parse_metadata(group or b"", array or b"", str(path))
    except UnreachableStore:
        raise
    except (OSError, StoreError):
        return None


def new_metadata(encoding: Encoding, compressor: str, views: int, rows: int) -> StoreMetadata:
    """Returns the metadata of a store that ``StoreWriter`` would write."""
    return StoreMetadata(Layout.fit(views, rows, encoding), encoding, compressor)


def rewrite_metadata(path: Path, metadata: StoreMetadata) -> None:
    """Writes every ``zarr.json`` again."""
    target = open_target(path)
    for name, document in metadata.documents().items():
        target.write(name, document)


def rewrite_side_arrays(path: Path, labels: NDArray[np.int64], index: NDArray[np.int64]) -> None:
    """Writes labels and index, int64 (rows,), again."""
    target = open_target(path)
    for name, array in zip(SIDE_ARRAYS, (labels, index), strict=True):
        target.write(f"{name}/c.0", shards.with_crc(array.astype("<i8").tobytes()))


def damaged_shards(path: Path, metadata: StoreMetadata) -> dict[tuple[int, int], Collection[int]]:
    """Finds the damaged chunks of a store. Returns their slots by (view, shard); those of a shard
    that is damaged as a whole are all its slots."""
    damaged: dict[tuple[int, int], Collection[int]] = {}
    source = open_target(path).source
    for view in range(metadata.layout.views):
        for shard in range(metadata.layout.shards):
            if damage := shard_damage(source, metadata, view, shard):
                slots = range(metadata.layout.chunks_in(shard))
                damaged[view, shard] = slots if isinstance(damage, str) else damage.keys()
    return damaged


def rewrite_chunks(
    path: Path,
    metadata: StoreMetadata,
    view: int,
    shard: int,
    slots: Collection[int],
    rows_of: Callable[[int], NDArray[np.float32]],
) -> None:
    """Writes a shard again: the chunks in ``slots`` from their rows, the others unchanged.

    Args:
        slots: numbers of chunks in the shard, from 0.
        rows_of: returns the decoded rows, (n, *row_shape), of a chunk of the view.
    """
    layout, key, target = metadata.layout, metadata.shard_key(view, shard), open_target(path)
    file = path / key
    file.parent.mkdir(parents=True, exist_ok=True)
    intact = {}
    if len(slots) < layout.chunks_in(shard):
        data, size = target.source.whole(key) or b"", shards.index_bytes(layout.shard_chunks)
        index = shards.parse_index(data[-size:], layout.shard_chunks, str(file))
        for slot in range(layout.chunks_in(shard)):
            start, length = (int(entry) for entry in index[slot])
            intact[slot] = data[start : start + length]
    writer = shards.ShardWriter(file, layout.shard_chunks)
    try:
        for slot in range(layout.chunks_in(shard)):
            if slot in slots:
                rows = rows_of(shard * layout.shard_chunks + slot)
                writer.append(encode_rows(rows, metadata))
            else:
                writer.append(intact[slot])
        target.keep(key, writer.close())
    except BaseException:
        writer.discard()
        raise


def shard_digests(path: Path, metadata: StoreMetadata) -> list[bytes]:
    """Computes ``StoreSummary.shards``, as bytes, from the files on disk."""
    layout = metadata.layout
    places = [(view, shard) for view in range(layout.views) for shard in range(layout.shards)]
    target = open_target(path)
    return [target.digest(metadata.shard_key(*place)) for place in places]
