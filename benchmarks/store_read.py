"""The speed of reading a store, compared with a memory map, zarr-python, and the decoder alone.

Chunks in random order are read into the slots of a window, as `BatchLoader` does: from the page
cache, every checksum verified, on a few threads. It is compared, on the same threads and chunks,
with a copy of the same stored bytes from an `np.memmap`, with zarr-python on the same store, with
Blosc decoding chunks that are in memory already, and with the least that a verified read takes: the
checksum, then that copy or decoder. Values are leaky ReLU of normal numbers, rows those of a
convolution. Prints how many times as fast as each of them the store is: medians of interleaved
repetitions.
"""

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import click
import numcodecs.blosc
import numpy as np
import zarr
from numpy.typing import NDArray

from greedy.cache import COMPRESSORS, ENCODINGS, Store, StoreWriter, fit_encoding, window_chunks
from greedy.cache.checksum import crc32c
from greedy.cache.shards import CRC_BYTES, encode_chunk

SHAPE = (64, 16, 16)
ROWS = 8192
PARTS = 4  # of the store; one measurement reads the chunks of one part

Read = Callable[[int, NDArray[Any]], object]


def activations(rows: int) -> NDArray[np.float32]:
    """Returns activations like those of a trained stage."""
    values = np.random.default_rng(0).standard_normal((rows, *SHAPE), dtype=np.float32)
    return np.maximum(values, 0.01 * values)


def write(path: Path, encoding: str, compressor: str, values: NDArray[np.float32]) -> Store:
    """Writes and opens a store that holds the values several times."""
    with StoreWriter(
        path,
        rows=ROWS,
        views=1,
        encoding=fit_encoding(encoding, values),
        compressor=compressor,
        labels=np.zeros(ROWS),
        index=np.arange(ROWS),
    ) as writer:
        for _ in range(ROWS // len(values)):
            writer.append(values)
    return Store(path)


def readers(store: Store, path: Path, beside: Path, pool: Executor) -> dict[str, Read]:
    """Returns functions that read a chunk into a slot, by name. The file of the memory map is
    written to ``beside``."""
    stored = store.load()[0]
    stored.tofile(beside)
    mapped = np.memmap(beside, stored.dtype, "r", shape=stored.shape)
    array = zarr.open_array(path / "activations", mode="r")
    chunks = [slice(row, row + store.chunk_rows) for row in range(0, store.rows, store.chunk_rows)]
    by_name: dict[str, Read] = {
        "store": lambda chunk, slot: store.read_chunk(0, chunk, slot),
        "memmap": lambda chunk, slot: np.copyto(slot, mapped[chunks[chunk]]),
        "zarr": lambda chunk, slot: array[0, chunks[chunk]],
    }
    read, encoded = by_name["memmap"], [mapped[rows] for rows in chunks]
    if store.compressor != "none":

        def encode(rows: slice) -> NDArray[np.uint8]:
            return np.frombuffer(encode_chunk(stored[rows], store.compressor), np.uint8)[
                :-CRC_BYTES
            ]

        def decode(chunk: int, slot: NDArray[Any]) -> None:
            numcodecs.blosc.decompress(encoded[chunk], slot)

        encoded = list(pool.map(encode, chunks))
        read = by_name["decode"] = decode
    by_name["least"] = lambda chunk, slot: (crc32c(encoded[chunk]), read(chunk, slot))
    return by_name


def compare(store: Store, reads: dict[str, Read], repetitions: int, pool: Executor) -> list[dict]:
    """Returns, for each repetition, the seconds that each reader took for one part of the store."""
    encoding, window = store.encoding, window_chunks(store.chunk_rows)
    slots = np.zeros((window, store.chunk_rows, *encoding.stored_shape), encoding.stored_dtype)
    parts = np.split(np.random.default_rng(1).permutation(store.layout.chunks), PARTS)

    def seconds(read: Read, chunks: list[int]) -> float:
        targets = [slots[place % window] for place in range(len(chunks))]
        start = time.perf_counter()
        list(pool.map(read, chunks, targets))
        return time.perf_counter() - start

    for part in parts:  # warm
        for read in reads.values():
            seconds(read, part.tolist())
    return [
        {
            # Never what the reader before it has just left in the processor's caches.
            name: seconds(read, parts[(repetition + place) % PARTS].tolist())
            for place, (name, read) in enumerate(reads.items())
        }
        for repetition in range(repetitions)
    ]


def row(encoding: str, compressor: str, repetitions: int, pool: Executor) -> dict[str, Any]:
    """Measures how many times as fast as each other reader the store is."""
    with tempfile.TemporaryDirectory() as directory:
        path, beside = Path(directory) / "store", Path(directory) / "values"
        store = write(path, encoding, compressor, activations(1024))
        reads = readers(store, path, beside, pool)
        times = compare(store, reads, repetitions, pool)
    ratios = {
        f"ratio_{name}": round(statistics.median(t[name] / t["store"] for t in times), 3)
        if name in reads
        else None
        for name in ("memmap", "zarr", "decode", "least")
    }
    return {"encoding": encoding, "compressor": compressor, **ratios}


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@click.option("--repetitions", default=24, show_default=True, help="Interleaved measurements.")
@click.option("--threads", default=2, show_default=True, help="Threads that read chunks.")
def main(as_json: bool, repetitions: int, threads: int) -> None:
    """Print the speed of reading a store, relative to other ways to get the same values."""
    rows = []
    with ThreadPoolExecutor(threads) as pool:
        for encoding in ENCODINGS:
            for compressor in COMPRESSORS:
                rows.append(row(encoding, compressor, repetitions, pool))
                if not as_json:
                    click.echo(rows[-1])
    if as_json:
        click.echo(json.dumps({"rows": rows}))


if __name__ == "__main__":
    main()
