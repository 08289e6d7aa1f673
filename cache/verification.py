"""Search for damage in every file of a store."""

import errno
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from greedy.cache import shards
from greedy.cache.errors import DamagedStore, StoreError
from greedy.cache.metadata import SIDE_ARRAYS, StoreMetadata, parse_metadata
from greedy.cache.objects import Objects
from greedy.cache.sources import ByteSource, ReadSource
from greedy.cache.threads import background, in_order
from greedy.cache.urls import LOCATION, location_of

THREADS = 2


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
    """Finds everything that is wrong with the store in the directory ``path``, or for which that
    stands, in a fixed order.

    Every byte is read: each chunk must match its checksum, have the Blosc header that its layout
    requires, and decode; shard indexes, labels and index must match their checksums; metadata
    must be equal to those written. If the metadata cannot be read, the chunks cannot be found, and
    only labels and index are checked. Files are read, not mapped, so that a disk that cannot read
    one is reported like other damage. Memory: one chunk for each thread.

    Raises:
        UnreachableStore: the store is in object storage that does not answer.
    """
    try:
        url = location_of(path)
    except StoreError:
        return [Damage(path / LOCATION, "does not hold a store's URL")]
    source = ReadSource(path) if url is None else Objects.at(url)
    damages = [Damage(path / key, problem) for key, problem in _faults(source)]
    if url is None:
        return damages
    return [replace(damage, problem=f"{damage.problem} (at {url})") for damage in damages]


def _faults(source: ByteSource) -> Iterator[tuple[str, str]]:
    """Yields the key of each damaged file and what is wrong with it."""
    metadata, faults = _read_metadata(source)
    yield from faults
    rows = metadata.layout.rows if metadata else None
    jobs: list[Callable[[], list[tuple[str, str]]]] = [
        partial(_verify_side_array, source, f"{name}/c.0", rows) for name in SIDE_ARRAYS
    ]
    if metadata:
        jobs += [
            partial(_verify_document, source, name, text)
            for name, text in metadata.documents().items()
        ]
        jobs += [
            partial(_verify_shard, source, metadata, view, shard)
            for view in range(metadata.layout.views)
            for shard in range(metadata.layout.shards)
        ]
    with background(THREADS) as pool:
        for more in in_order(pool, jobs, 2 * THREADS):
            yield from more


def _read_metadata(
    source: ByteSource,
) -> tuple[StoreMetadata | None, list[tuple[str, str]]]:
    """Reads the metadata of a store. Returns them, or ``None`` and the damage to them."""
    texts, faults = [], []
    for key in ("zarr.json", "activations/zarr.json"):
        try:
            texts.append(_whole(source, key))
            json.loads(texts[-1])
        except OSError as error:
            faults.append((key, _unreadable(error)))
        except (ValueError, RecursionError):
            faults.append((key, "is not JSON"))
    if faults:
        return None, faults
    try:
        return parse_metadata(texts[0], texts[1], str(source)), []
    except StoreError as error:
        problem = error.problem if isinstance(error, DamagedStore) else str(error)
        return None, [("zarr.json", f"does not fit activations/zarr.json: {problem}")]


def _whole(source: ByteSource, key: str) -> bytes:
    data = source.whole(key)
    if data is None:
        raise FileNotFoundError
    return data


def _verify_document(source: ByteSource, key: str, written: bytes) -> list[tuple[str, str]]:
    try:
        if json.loads(_whole(source, key)) == json.loads(written):
            return []
    except OSError as error:
        return [(key, _unreadable(error))]
    except (ValueError, RecursionError):
        pass
    return [(key, "is not what was written")]


def _verify_side_array(source: ByteSource, key: str, rows: int | None) -> list[tuple[str, str]]:
    try:
        values = shards.without_crc(np.frombuffer(_whole(source, key), np.uint8), "it")
    except OSError as error:
        return [(key, _unreadable(error))]
    except DamagedStore as error:
        return [(key, error.problem)]
    if rows is not None and values.nbytes != 8 * rows:
        return [(key, f"does not have {rows} rows")]
    return []


def shard_damage(
    source: ByteSource, metadata: StoreMetadata, view: int, shard: int
) -> dict[int, str] | str:
    """Finds the damage to a shard.

    Returns:
        What is wrong with each damaged chunk, by its slot; or, if the shard is damaged as a whole,
        what is wrong with that.
    """
    key, layout = metadata.shard_key(view, shard), metadata.layout
    first, slots = shard * layout.shard_chunks, layout.shard_chunks
    try:
        if (tail := source.tail(key, shards.index_bytes(slots))) is None:
            raise FileNotFoundError
        index = shards.parse_index(tail, slots, "every chunk")
        damages = {}
        for slot in range(layout.chunks_in(shard)):
            where = f"chunk {first + slot} of view {view}"
            damage = _chunk_damage(source, key, metadata, index, slot, where)
            if damage is not None:
                damages[slot] = damage
        return damages
    except OSError as error:
        return _unreadable(error)
    except DamagedStore as error:
        return error.problem


def _verify_shard(
    source: ByteSource, metadata: StoreMetadata, view: int, shard: int
) -> list[tuple[str, str]]:
    key = metadata.shard_key(view, shard)
    damage = shard_damage(source, metadata, view, shard)
    if damage and source.forget(key, 0):  # replaced meanwhile
        damage = shard_damage(source, metadata, view, shard)
    problems = [damage] if isinstance(damage, str) else damage.values()
    return [(key, problem) for problem in problems]


def _chunk_damage(
    source: ByteSource,
    key: str,
    metadata: StoreMetadata,
    index: NDArray[np.uint64],
    slot: int,
    where: str,
) -> str | None:
    compressor = metadata.compressor
    chunk = np.empty(metadata.chunk_shape, metadata.encoding.stored_dtype)
    try:
        offset, size = shards.chunk_span(index, slot, chunk.nbytes, compressor, where)
        if (data := source.part(key, offset, size)) is None:
            return f"{where} lies beyond the end of its shard"
        shards.decode_chunk(data, compressor, chunk, where)
    except DamagedStore as error:
        return error.problem
    except OSError as error:
        return _unreadable(error, f"{where} ")
    return None


def unreadable(file: Path, error: OSError) -> Damage:
    """Returns the damage to a file that could not be read. Raises the error if its cause is a limit
    of this process, such as its number of open files."""
    return Damage(file, _unreadable(error))


def _unreadable(error: OSError, where: str = "") -> str:
    if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
        raise error
    if isinstance(error, FileNotFoundError):
        return f"{where}is missing"
    return f"{where}cannot be read: {error.strerror}"
