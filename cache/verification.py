"""Search for damage in every file of a store."""

import errno
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from greedy.cache import shards
from greedy.cache.errors import DamagedStore, StoreError
from greedy.cache.metadata import SIDE_ARRAYS, StoreMetadata, parse_metadata
from greedy.cache.threads import background, in_order

THREADS = 2
_ADVICE = "write the store again"


@dataclass(frozen=True)
class Damage:
    """One thing that is wrong with a store.

    Attributes:
        path: the file.
        problem: what is wrong with it; names the chunk if it is one chunk.
    """

    path: Path
    problem: str


def verify(path: Path) -> list[Damage]:
    """Finds everything that is wrong with the store in the directory ``path``, in a fixed order.

    Every byte is read: each chunk must match its checksum, have the Blosc header that its layout
    requires, and decode; shard indexes, labels and index must match their checksums; metadata
    must be equal to those written. If the metadata cannot be read, the chunks cannot be found, and
    only labels and index are checked. Files are read, not mapped, so that a disk that cannot read
    one is reported like other damage. Memory: one chunk for each thread.
    """
    metadata, damages = _read_metadata(path)
    rows = metadata.layout.rows if metadata else None
    jobs: list[Callable[[], list[Damage]]] = [
        partial(_verify_side_array, path / name / "c.0", rows) for name in SIDE_ARRAYS
    ]
    if metadata:
        jobs += [
            partial(_verify_document, path / name, text)
            for name, text in metadata.documents().items()
        ]
        jobs += [
            partial(_verify_shard, path, metadata, view, shard)
            for view in range(metadata.layout.views)
            for shard in range(metadata.layout.shards)
        ]
    with background(THREADS) as pool:
        for more in in_order(pool, jobs, 2 * THREADS):
            damages += more
    return damages


def _read_metadata(path: Path) -> tuple[StoreMetadata | None, list[Damage]]:
    """Reads the metadata of a store. Returns them, or ``None`` and the damage to them."""
    texts, damages = [], []
    for file in (path / "zarr.json", path / "activations" / "zarr.json"):
        try:
            texts.append(file.read_bytes())
            json.loads(texts[-1])
        except OSError as error:
            damages.append(unreadable(file, error))
        except (ValueError, RecursionError):
            damages.append(Damage(file, f"is not JSON; {_ADVICE}"))
    if damages:
        return None, damages
    try:
        return parse_metadata(texts[0], texts[1], str(path)), []
    except StoreError as error:
        return None, [Damage(path / "zarr.json", f"does not fit activations/zarr.json: {error}")]


def _verify_document(file: Path, written: bytes) -> list[Damage]:
    try:
        if json.loads(file.read_bytes()) == json.loads(written):
            return []
    except OSError as error:
        return [unreadable(file, error)]
    except (ValueError, RecursionError):
        pass
    return [Damage(file, f"is not what was written; {_ADVICE}")]


def _verify_side_array(file: Path, rows: int | None) -> list[Damage]:
    try:
        values = shards.without_crc(np.frombuffer(file.read_bytes(), np.uint8), "it")
    except OSError as error:
        return [unreadable(file, error)]
    except DamagedStore as error:
        return [Damage(file, str(error))]
    if rows is not None and values.nbytes != 8 * rows:
        return [Damage(file, f"does not have {rows} rows; {_ADVICE}")]
    return []


def shard_damage(
    root: Path, metadata: StoreMetadata, view: int, shard: int
) -> dict[int, str] | str:
    """Finds the damage to a shard.

    Returns:
        What is wrong with each damaged chunk, by its slot; or, if the shard is damaged as a whole,
        what is wrong with that.
    """
    path, layout = root / metadata.shard_key(view, shard), metadata.layout
    first, slots = shard * layout.shard_chunks, layout.shard_chunks
    try:
        with path.open("rb") as file:
            length = file.seek(0, os.SEEK_END)
            file.seek(max(length - shards.index_bytes(slots), 0))
            index = shards.parse_index(file.read(), slots, "every chunk")
            damages = {}
            for slot in range(layout.chunks_in(shard)):
                where = f"chunk {first + slot} of view {view}"
                damage = _chunk_damage(file, metadata, index, slot, where)
                if damage is not None:
                    damages[slot] = damage
            return damages
    except OSError as error:
        return unreadable(path, error).problem
    except DamagedStore as error:
        return str(error)


def _verify_shard(root: Path, metadata: StoreMetadata, view: int, shard: int) -> list[Damage]:
    file = root / metadata.shard_key(view, shard)
    damage = shard_damage(root, metadata, view, shard)
    if isinstance(damage, str):
        return [Damage(file, damage)]
    return [Damage(file, problem) for problem in damage.values()]


def _chunk_damage(
    shard: BinaryIO, metadata: StoreMetadata, index: NDArray[np.uint64], slot: int, where: str
) -> str | None:
    compressor = metadata.compressor
    chunk = np.empty(metadata.chunk_shape, metadata.encoding.stored_dtype)
    try:
        offset, size = shards.chunk_span(index, slot, chunk.nbytes, compressor, where)
        shard.seek(offset)
        data = np.frombuffer(shard.read(size), np.uint8)
        if len(data) < size:
            return f"{where} lies beyond the end of its shard; {_ADVICE}"
        shards.decode_chunk(data, compressor, chunk, where)
    except DamagedStore as error:
        return str(error)
    except OSError as error:
        return f"{where} cannot be read: {error.strerror}"
    return None


def unreadable(file: Path, error: OSError) -> Damage:
    """Returns the damage to a file that could not be read. Raises the error if its cause is a limit
    of this process, such as its number of open files."""
    if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
        raise error
    if isinstance(error, FileNotFoundError):
        return Damage(file, f"is missing; {_ADVICE}")
    return Damage(file, f"cannot be read: {error.strerror}")
