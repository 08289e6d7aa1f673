"""Putting right what is damaged in a store, and touching nothing else."""

import hashlib
from collections.abc import Callable, Collection
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from . import shards
from .encodings import Encoding
from .errors import StoreError
from .files import write_whole
from .layout import Layout
from .metadata import SIDE_ARRAYS, Description, parse
from .verification import shard_damage
from .writer import encode_rows


def describe_store(path: Path) -> Description | None:
    """What the metadata of a store say; `None` if they are damaged or missing."""
    try:
        group, array = (path / "zarr.json", path / "activations" / "zarr.json")
        return parse(group.read_bytes(), array.read_bytes(), str(path))
    except (OSError, StoreError):
        return None


def description_of(encoding: Encoding, compressor: str, views: int, rows: int) -> Description:
    """What the metadata of such a store say, as `StoreWriter` lays it out."""
    return Description(Layout.fit(views, rows, encoding), encoding, compressor)


def rewrite_metadata(path: Path, description: Description) -> None:
    """Write every `zarr.json` as it was."""
    for name, document in description.documents().items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        write_whole(path / name, document)


def rewrite_side_arrays(path: Path, labels: NDArray[np.int64], index: NDArray[np.int64]) -> None:
    """Write labels and index as they were."""
    for name, array in zip(SIDE_ARRAYS, (labels, index), strict=True):
        (path / name).mkdir(parents=True, exist_ok=True)
        write_whole(path / name / "c.0", shards.with_crc(array.astype("<i8").tobytes()))


def damaged_shards(path: Path, description: Description) -> dict[tuple[int, int], Collection[int]]:
    """The places of the chunks that are damaged, by view and shard; of a shard that is damaged
    as a whole, all of them."""
    found: dict[tuple[int, int], Collection[int]] = {}
    for view in range(description.layout.views):
        for shard in range(description.layout.shards):
            if damage := shard_damage(path, description, view, shard):
                every = range(description.layout.chunks_in(shard))
                found[view, shard] = every if isinstance(damage, str) else damage.keys()
    return found


def rewrite_chunks(
    path: Path,
    description: Description,
    view: int,
    shard: int,
    places: Collection[int],
    rows_of: Callable[[int], NDArray[np.float32]],
) -> None:
    """Write a shard anew: chunks at `places` from their rows, others as they are.

    Args:
        rows_of: decoded rows, (n, *row_shape), of a chunk of the view.
    """
    layout, file = description.layout, path / description.shard_key(view, shard)
    file.parent.mkdir(parents=True, exist_ok=True)
    kept = {}
    if len(places) < layout.chunks_in(shard):
        data, size = file.read_bytes(), shards.index_bytes(layout.shard_chunks)
        index = shards.parse_index(data[-size:], layout.shard_chunks, str(file))
        for place in range(layout.chunks_in(shard)):
            start, length = (int(entry) for entry in index[place])
            kept[place] = data[start : start + length]
    writer = shards.ShardWriter(file, layout.shard_chunks)
    try:
        for place in range(layout.chunks_in(shard)):
            if place in places:
                rows = rows_of(shard * layout.shard_chunks + place)
                writer.append(encode_rows(rows, description))
            else:
                writer.append(kept[place])
        writer.close()
    except BaseException:
        writer.discard()
        raise


def content_digest(
    path: Path, description: Description, labels: NDArray[np.int64], index: NDArray[np.int64]
) -> str:
    """`StoreSummary.digest`, from what is on disk."""
    digest = hashlib.blake2b()
    for array in (labels, index):
        digest.update(array.astype("<i8").tobytes())
    for view in range(description.layout.views):
        for shard in range(description.layout.shards):
            digest.update(shards.shard_digest(path / description.shard_key(view, shard)))
    return digest.hexdigest()
