"""The speed of reading a store from object storage, and from the local cache of its chunks.

A server of object storage, SeaweedFS, runs on this machine. Chunks are read in random order into
the slots of a window on as many threads as `BatchLoader` uses, every checksum verified, and
compared with obstore alone, which gets the same ranges on the same threads; then from the local
cache, compared with the same store in a local directory. Prints bytes a second, and the ratios of
both pairs: medians of interleaved repetitions.
"""

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest.mock import patch

import click
import numpy as np
import obstore
from seaweed import BUCKET, running
from store_read import ROWS, activations, write

from greedy.cache import COMPRESSORS, ENCODINGS, Store, open_chunk_cache, put_elsewhere

AT_ONCE = 48  # chunks in one measurement
URL = f"s3://{BUCKET}/store"
Read = Callable[[int], object]


def obstore_alone(store: Store) -> Read:
    """Returns a function that gets the bytes of a chunk with obstore and does nothing else."""
    objects: Any = store._source
    spans = [store._span(store._shard(0, chunk), 0, chunk) for chunk in range(store.layout.chunks)]

    def read(chunk: int) -> object:
        key, _, offset, size = spans[chunk]
        return obstore.get_range(objects._client, objects._path(key), start=offset, length=size)

    return read


def rate(store: Store, read: Read, chunks: list[int], pool: ThreadPoolExecutor) -> float:
    """Returns the bytes on disk that are read a second."""
    began = time.perf_counter()
    for _ in pool.map(read, chunks):
        pass
    return store.disk_bytes * len(chunks) / store.layout.chunks / (time.perf_counter() - began)


def measure(place: Path, encoding: str, compressor: str, repeats: int) -> dict[str, list[float]]:
    """Returns the rates of all ways to read, each repeated."""
    values = activations(1024)
    local = write(place / "local", encoding, compressor, values)
    put_elsewhere(place / "remote", URL)
    write(place / "remote", encoding, compressor, values)
    remote = Store(URL)
    kept = Store(URL, kept=open_chunk_cache(place / "kept", 2 * local.disk_bytes))
    kept.load()
    slots = np.zeros(
        (local.layout.chunks, *local.metadata.chunk_shape), local.encoding.stored_dtype
    )
    ways: dict[str, Read] = {
        "remote": lambda chunk: remote.read_chunk(0, chunk, slots[chunk]),
        "obstore": obstore_alone(remote),
        "cached": lambda chunk: kept.read_chunk(0, chunk, slots[chunk]),
        "local": lambda chunk: local.read_chunk(0, chunk, slots[chunk]),
    }
    rates: dict[str, list[float]] = {name: [] for name in ways}
    random = np.random.default_rng(0)
    with ThreadPoolExecutor(remote.requests) as many, ThreadPoolExecutor(local.requests) as few:
        for repeat in range(repeats):
            for name in sorted(ways, reverse=repeat % 2 == 1):
                chunks = random.choice(local.layout.chunks, AT_ONCE, replace=False).tolist()
                pool = many if name in ("remote", "obstore") else few
                rates[name].append(rate(local, ways[name], chunks, pool))
    return rates


@click.command()
@click.option("--encoding", default="uint8", show_default=True, type=click.Choice(ENCODINGS))
@click.option("--compressor", default="lz4", show_default=True, type=click.Choice(COMPRESSORS))
@click.option("--repeats", default=25, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def main(encoding: str, compressor: str, repeats: int, as_json: bool) -> None:
    """Measure reading from object storage and from the local cache."""
    with (
        tempfile.TemporaryDirectory() as directory,
        running(Path(directory, "server")) as server,
        patch.dict(os.environ, server.environment),
    ):
        rates = measure(Path(directory), encoding, compressor, repeats)
    rate_of = {name: statistics.median(each) for name, each in rates.items()}
    ratios = {
        f"{a}_over_{b}": statistics.median(x / y for x, y in zip(rates[a], rates[b], strict=True))
        for a, b in (("remote", "obstore"), ("cached", "local"))
    }
    if as_json:
        click.echo(json.dumps({"rows": ROWS, "bytes_per_second": rate_of, **ratios}))
        return
    for name, value in rate_of.items():
        click.echo(f"{name:8} {value / 1e6:7.0f} MB/s")
    for name, value in ratios.items():
        click.echo(f"{name.replace('_', ' ')}: {value:.2f}")


if __name__ == "__main__":
    main()
