"""Stores: what is written is what is read, by us and by anyone."""

import json
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import zarr

from greedy.cache import (
    COMPRESSORS,
    ENCODINGS,
    Encoding,
    Layout,
    NonFiniteActivation,
    Store,
    StoreError,
    StoreSummary,
    StoreWriter,
    fit_encoding,
    pixels,
)

ROWS, VIEWS = 37, 2
# Ten chunks of 4 rows, the last of one row; shards of 3 chunks, the last of one chunk.
SMALL = Layout(VIEWS, ROWS, chunk_rows=4, shard_rows=12)
LABELS = np.arange(ROWS) % 5
INDEX = np.arange(ROWS)[::-1].copy()


def activations(row_shape: tuple[int, ...]) -> np.ndarray:
    normal = np.random.default_rng(1).standard_normal((VIEWS, ROWS, *row_shape))
    return np.where(normal > 0, normal, 0.01 * normal).astype(np.float32)


def write(
    path: Path,
    values: np.ndarray,
    encoding: Encoding,
    compressor: str = "lz4",
    threads: int = 2,
    step: int = 5,
    **options: object,
) -> StoreSummary:
    with StoreWriter(
        path,
        rows=ROWS,
        views=VIEWS,
        encoding=encoding,
        compressor=compressor,
        labels=LABELS,
        index=INDEX,
        threads=threads,
        layout=SMALL,
        **options,
    ) as writer:
        flat = values.reshape(-1, *values.shape[2:])
        for start in range(0, len(flat), step):
            writer.append(flat[start : start + step])
    return writer.summary


def files(path: Path) -> dict[str, bytes]:
    return {str(f.relative_to(path)): f.read_bytes() for f in path.rglob("*") if f.is_file()}


@pytest.mark.parametrize("row_shape", [(3, 5, 5), (7,)], ids=["conv", "vector"])
@pytest.mark.parametrize("compressor", COMPRESSORS)
@pytest.mark.parametrize("name", ENCODINGS)
def test_round_trip(tmp_path: Path, name: str, compressor: str, row_shape: tuple) -> None:
    values = activations(row_shape)
    encoding = fit_encoding(name, values[0])
    summary = write(tmp_path / "s", values, encoding, compressor)
    expected = np.stack([encoding.encode(view) for view in values])

    store = Store(tmp_path / "s")
    assert (store.rows, store.views, store.row_shape) == (ROWS, VIEWS, row_shape)
    assert (store.chunk_rows, store.compressor) == (4, compressor)
    assert store.stored_bytes == expected.nbytes
    assert summary.disk_bytes == store.disk_bytes == sum(map(len, files(tmp_path / "s").values()))
    assert summary.values == values.size
    np.testing.assert_array_equal(store.labels, LABELS)
    np.testing.assert_array_equal(store.index, INDEX)
    np.testing.assert_array_equal(store.load(), expected)
    np.testing.assert_array_equal(store.load(rows=13), expected[:, :13])
    np.testing.assert_array_equal(store.read_chunk(1, 9), expected[1, 36:])
    read = store.encoding.decode_array(store.read_rows(1, 0, ROWS))
    np.testing.assert_array_equal(read, encoding.decode_array(expected[1]))

    by_zarr = zarr.open_group(tmp_path / "s", mode="r")
    np.testing.assert_array_equal(by_zarr["activations"][:], expected)
    np.testing.assert_array_equal(by_zarr["labels"][:], LABELS)
    np.testing.assert_array_equal(by_zarr["index"][:], INDEX)


@pytest.mark.parametrize(("start", "stop"), [(0, 37), (0, 1), (3, 5), (4, 8), (7, 36), (36, 37)])
def test_ranges_and_batches(tmp_path: Path, start: int, stop: int) -> None:
    values = activations((7,))
    write(tmp_path / "s", values, Encoding("float32", (7,)))
    store = Store(tmp_path / "s")
    np.testing.assert_array_equal(store.read_rows(1, start, stop), values[1, start:stop])
    for size in (1, 3, 4, 10, 100):
        batches = list(store.batches(1, size, start, stop))
        assert {len(batch) for batch in batches[:-1]} <= {size}
        np.testing.assert_array_equal(np.concatenate(batches), values[1, start:stop])


def test_chunk_is_read_into_place(tmp_path: Path) -> None:
    values = activations((7,))
    write(tmp_path / "s", values, Encoding("float32", (7,)))
    store = Store(tmp_path / "s")
    out = np.full((10, 7), -1, np.float32)
    store.read_chunk(0, 2, out[:4])
    store.read_chunk(0, 3, out[4:6])
    store.read_chunk(0, 4, out[::-1][:4])
    np.testing.assert_array_equal(out[:6], values[0, 8:14])
    np.testing.assert_array_equal(out[6:], values[0, 16:20][::-1])


def test_raw_images_are_stored_as_they_are(tmp_path: Path) -> None:
    images = np.random.default_rng(2).integers(0, 256, (VIEWS, ROWS, 3, 4, 4), np.uint8)
    write(tmp_path / "s", images, pixels((3, 4, 4)), encoded=True)
    np.testing.assert_array_equal(Store(tmp_path / "s").load(), images)


FOREIGN_READER = """
import sys
import numpy as np, zarr
group = zarr.open_group(sys.argv[1], mode="r")
about = group.attrs["greedy"]
stored, encoding = group["activations"][:], about["encoding"]
row_shape = about["row_shape"]
if encoding["name"] == "bfloat16":
    stored = (stored.astype(np.uint32) << 16).view(np.float32)
if encoding["name"] == "uint4":
    stored = np.stack([stored & 15, stored >> 4], -1).reshape(*stored.shape[:2], -1)
    stored = stored[..., : np.prod(row_shape)].reshape(*stored.shape[:2], *row_shape)
values = stored.astype(np.float32)
if "scale" in encoding:
    spread = (-1, *[1] * (len(row_shape) - 1))
    values -= np.float32(encoding["zero_point"]).reshape(spread)
    values *= np.float32(encoding["scale"]).reshape(spread)
assert not any(name.split(".")[0] == "greedy" for name in sys.modules)
np.save(sys.argv[2], values)
"""


@pytest.mark.parametrize("name", ENCODINGS)
def test_zarr_and_the_attributes_are_enough(tmp_path: Path, name: str) -> None:
    values = activations((3, 3, 3))
    encoding = fit_encoding(name, values[0])
    write(tmp_path / "s", values, encoding, "zstd")
    command = [sys.executable, "-c", FOREIGN_READER, tmp_path / "s", tmp_path / "values.npy"]
    subprocess.run(command, check=True)
    expected = np.stack([encoding.decode_array(encoding.encode(view)) for view in values])
    np.testing.assert_array_equal(np.load(tmp_path / "values.npy"), expected)


@pytest.mark.parametrize("compressor", COMPRESSORS)
def test_any_zarr_store_gives_the_same(tmp_path: Path, compressor: str) -> None:
    values = activations((3, 5, 5))
    write(tmp_path / "s", values, fit_encoding("uint8", values[0]), compressor)
    local = Store(tmp_path / "s")
    with zarr.storage.ZipStore(tmp_path / "s.zip", mode="w") as archive:
        for name, data in files(tmp_path / "s").items():
            archive._zf.writestr(f"train/{name}", data) if archive._is_open else None
