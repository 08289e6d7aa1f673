"""Stores: what is written is what is read, by us and by anyone."""

import json
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest
import zarr
from small_training import files
from zarr.buffer.cpu import Buffer

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
    pixel_encoding,
    verify,
)
from greedy.cache import repair as cache_repair

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
    **options: Any,
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
    write(tmp_path / "s", images, pixel_encoding((3, 4, 4)), encoded=True)
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
    spread = -1 if len(row_shape) == 2 else (-1, *[1] * (len(row_shape) - 1))
    values -= np.float32(encoding["zero_point"]).reshape(spread)
    values *= np.float32(encoding["scale"]).reshape(spread)
assert not any(name.split(".")[0] == "greedy" for name in sys.modules)
np.save(sys.argv[2], values)
"""


@pytest.mark.parametrize("row", [(7,), (5, 3), (3, 3, 3)], ids=["vectors", "tokens", "maps"])
@pytest.mark.parametrize("name", ENCODINGS)
def test_zarr_and_the_attributes_are_enough(
    tmp_path: Path, name: str, row: tuple[int, ...]
) -> None:
    values = activations(row)
    encoding = fit_encoding(name, values[0])
    write(tmp_path / "s", values, encoding, "zstd")
    command = [sys.executable, "-c", FOREIGN_READER, tmp_path / "s", tmp_path / "values.npy"]
    subprocess.run(command, check=True)
    expected = np.stack([encoding.decode_array(encoding.encode(view)) for view in values])
    np.testing.assert_array_equal(np.load(tmp_path / "values.npy"), expected)


def test_tokens_of_older_versions_are_read_and_their_metadata_mended(tmp_path: Path) -> None:
    """Those named one axis too few for Zarr."""
    values, store = activations((5, 3)), tmp_path / "s"
    write(store, values, fit_encoding("uint8", values[0]))
    expected, written = Store(store).load(), files(store)
    group, array = (json.loads(written[name]) for name in ("zarr.json", "activations/zarr.json"))
    array["dimension_names"] = ["view", "row", "feature"]
    about = group["attributes"]["greedy"]
    del about["crc32c"]
    about["crc32c"] = google_crc32c.value(json.dumps([about, array]).encode())
    (store / "zarr.json").write_text(json.dumps(group))
    (store / "activations/zarr.json").write_text(json.dumps(array))
    np.testing.assert_array_equal(Store(store).load(), expected)
    assert {damage.path.name for damage in verify(store)} == {"zarr.json"}
    metadata = cache_repair.read_metadata(store)
    assert metadata is not None
    cache_repair.rewrite_metadata(store, metadata)
    assert files(store) == written


@pytest.mark.parametrize("compressor", COMPRESSORS)
def test_any_zarr_store_gives_the_same(tmp_path: Path, compressor: str) -> None:
    values = activations((3, 5, 5))
    write(tmp_path / "s", values, fit_encoding("uint8", values[0]), compressor)
    local = Store(tmp_path / "s")
    with zipfile.ZipFile(tmp_path / "s.zip", "w") as archive:
        for name, data in files(tmp_path / "s").items():
            archive.writestr(f"train/{name}", data)
    buffers = {name: Buffer.from_bytes(data) for name, data in files(tmp_path / "s").items()}
    zipped = zarr.storage.ZipStore(tmp_path / "s.zip", mode="r")
    for location in (zarr.storage.MemoryStore(buffers), zarr.storage.StorePath(zipped, "train")):
        other = Store(location)
        np.testing.assert_array_equal(other.load(), local.load())
        np.testing.assert_array_equal(other.read_rows(1, 3, 30), local.read_rows(1, 3, 30))
        np.testing.assert_array_equal(other.labels, local.labels)
        assert other.disk_bytes == local.disk_bytes
    zipped.close()


@pytest.mark.parametrize("name", ENCODINGS)
def test_bytes_do_not_depend_on_threads_or_calls(tmp_path: Path, name: str) -> None:
    values = activations((3, 5, 5))
    encoding = fit_encoding(name, values[0])
    written = []
    for threads, step in [(1, 1), (2, 7), (4, 1000)]:
        path = tmp_path / f"{threads}"
        summary = write(path, values, encoding, "zstd", threads=threads, step=step)
        written.append((summary, files(path)))
    assert written[0] == written[1] == written[2]
    values[1, 36] += 1
    assert write(tmp_path / "other", values, encoding).digest != written[0][0].digest


@pytest.mark.parametrize("writers", [1, 2, 3, 11])
def test_several_writers_write_what_one_does(tmp_path: Path, writers: int) -> None:
    """Eleven writers are more than there are shards."""
    values = activations((3, 2, 2))
    encoding = fit_encoding("uint8", values[0])
    whole = write(tmp_path / "whole", values, encoding)
    rows = values.reshape(-1, 3, 2, 2)
    parts, shards = [], []
    for number in range(writers):
        with StoreWriter(
            tmp_path / "shared",
            rows=ROWS,
            views=VIEWS,
            encoding=encoding,
            compressor="lz4",
            labels=LABELS,
            index=INDEX,
            layout=SMALL,
            resume=True,
            share=(number, writers),
        ) as part:
            part.append(rows[part.first : part.stop])
        parts.append(part)
        shards += part.finish_part()
    assert parts[0].finish(shards) == whole
    assert files(tmp_path / "shared") == files(tmp_path / "whole")


def test_shards_are_few_and_whole_when_large(tmp_path: Path) -> None:
    encoding = Encoding("float32", (512, 32, 32))
    layout = Layout.fit(views=4, rows=50_000, encoding=encoding)
    assert layout.chunk_rows == 2
    assert layout.shard_rows == 96
    assert Layout.fit(4, 50_000, fit_encoding("uint8", np.ones((1, 512, 32, 32), "f4"))) == Layout(
        4, 50_000, chunk_rows=2, shard_rows=384
    )
    assert Layout.fit(1, 10, encoding).shard_rows == 10
    assert Layout.fit(1, 5000, Encoding("float32", (10,))).chunk_rows == 1024
    assert Layout.fit(1, 5000, Encoding("float32", (2**21,))).chunk_rows == 1


def test_non_finite_value_stops_the_write(tmp_path: Path) -> None:
    values = activations((3, 5, 5))
    values[0, 21, 2, 1, 1] = np.nan
    with pytest.raises(NonFiniteActivation, match="channel 2"):
        write(tmp_path / "s", values, fit_encoding("uint8", values[1]), step=1)
    # The chunk lies in the second shard: the first is whole, of the second nothing is left.
    assert list(files(tmp_path / "s")) == ["activations/c.0.0.0.0.0"]
    with pytest.raises(StoreError, match="not a finished"):
        Store(tmp_path / "s")


def test_a_failed_chunk_cannot_be_survived(tmp_path: Path) -> None:
    broken = np.full((ROWS, 7), np.inf, np.float32)
    with pytest.raises(StoreError, match="came"), writer_of(tmp_path / "s") as writer:
        writer.append(broken)
        with pytest.raises(NonFiniteActivation):
            writer.finish()
        writer.append(np.zeros_like(broken))


def test_interrupted_write_leaves_no_store(tmp_path: Path) -> None:
    values = activations((7,))
    with pytest.raises(KeyboardInterrupt), writer_of(tmp_path / "s") as writer:
        writer.append(values[0, :30])
        raise KeyboardInterrupt
    assert not any(name.endswith((".part", ".json")) for name in files(tmp_path / "s"))
    assert not any(thread.name.startswith("greedy-cache") for thread in threading.enumerate())


def writer_of(path: Path, **changes: Any) -> StoreWriter:
    arguments = {
        "rows": ROWS,
        "views": VIEWS,
        "encoding": Encoding("float32", (7,)),
        "compressor": "lz4",
        "labels": LABELS,
        "index": INDEX,
    }
    return StoreWriter(path, **arguments | changes)


def test_rows_must_all_come_and_fit(tmp_path: Path) -> None:
    values = activations((7,))
    with pytest.raises(StoreError, match="36 rows came"), writer_of(tmp_path / "a") as writer:
        writer.append(values[0, :36])
    with pytest.raises(StoreError, match="more were appended"), writer_of(tmp_path / "b") as writer:
        writer.append(values[0])
        writer.append(values[1])
        writer.append(values[1, :1])
    with pytest.raises(StoreError, match="must be float32"), writer_of(tmp_path / "c") as writer:
        writer.append(values[0].astype(np.float64))
    with pytest.raises(StoreError, match="must be float32"), writer_of(tmp_path / "d") as writer:
        writer.append(values[0][:, :6])


def test_arguments_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    for changes in (
        {"compressor": "gzip"},
        {"rows": 36},
        {"rows": 0, "labels": LABELS[:0], "index": INDEX[:0]},
        {"views": 0},
        {"index": INDEX[1:]},
    ):
        with pytest.raises(StoreError):
            writer_of(tmp_path / "s", **changes)
    write(tmp_path / "s", activations((7,)), Encoding("float32", (7,)))
    with pytest.raises(StoreError, match="already holds files"):
        writer_of(tmp_path / "s")


Change = Callable[[dict[str, Any]], object]


def edit(path: Path, change: Change) -> None:
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def sharding(document: dict) -> dict:
    return document["codecs"][0]["configuration"]


@pytest.mark.parametrize(("file", "change"), [
    ("zarr.json", lambda d: d.update(attributes={})),
    ("zarr.json", lambda d: d.update(attributes=[])),
    ("zarr.json", lambda d: d["attributes"]["greedy"].update(format=2)),
    ("zarr.json", lambda d: d["attributes"]["greedy"].update(compressor="none")),
    ("zarr.json", lambda d: d["attributes"]["greedy"].update(compressor="rm")),
    ("zarr.json", lambda d: d["attributes"]["greedy"].update(row_shape=[8])),
    ("zarr.json", lambda d: d["attributes"]["greedy"].update(row_shape=[])),
    ("zarr.json", lambda d: d["attributes"]["greedy"].update(row_shape=[2**31])),
    ("zarr.json", lambda d: d["attributes"]["greedy"].update(row_shape=["7"])),
    ("zarr.json", lambda d: d["attributes"]["greedy"].pop("encoding")),
    ("zarr.json", lambda d: d["attributes"]["greedy"]["encoding"].update(name="float16")),
    ("activations/zarr.json", lambda d: d.update(shape=[VIEWS, 2**50, 7])),
    ("activations/zarr.json", lambda d: d.update(shape=[VIEWS, 2**39, 7])),
    ("activations/zarr.json", lambda d: d.update(shape=[VIEWS, -1, 7])),
    ("activations/zarr.json", lambda d: d.update(shape=[VIEWS])),
    ("activations/zarr.json", lambda d: d.update(data_type="int32")),
    ("activations/zarr.json", lambda d: d.update(fill_value=1.0)),
    ("activations/zarr.json", lambda d: d.update(codecs=[])),
    ("activations/zarr.json", lambda d: d.update(codecs=sharding(d)["codecs"])),
    ("activations/zarr.json", lambda d: sharding(d).update(index_location="start")),
    ("activations/zarr.json", lambda d: sharding(d).update(chunk_shape=[1, 5, 7])),
    ("activations/zarr.json", lambda d: sharding(d).update(chunk_shape=[1, 0, 7])),
    ("activations/zarr.json", lambda d: sharding(d)["codecs"].pop()),
    ("activations/zarr.json", lambda d: sharding(d)["codecs"].insert(0, {"name": "transpose"})),
])  # fmt: skip
def test_stranger_s_metadata_is_refused(tmp_path: Path, file: str, change: Change) -> None:
    write(tmp_path / "s", activations((7,)), Encoding("float32", (7,)))
    edit(tmp_path / "s" / file, change)
    with pytest.raises(StoreError):
        Store(tmp_path / "s")


@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 100_000, "\x00"])
def test_metadata_that_is_not_json_is_refused(tmp_path: Path, text: str) -> None:
    write(tmp_path / "s", activations((7,)), Encoding("float32", (7,)))
    (tmp_path / "s/activations/zarr.json").write_text(text)
    with pytest.raises(StoreError, match="JSON"):
        Store(tmp_path / "s")


def test_absent_store_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="not a finished activation store"):
        Store(tmp_path / "nothing")
    with pytest.raises(StoreError, match="not a finished activation store"):
        Store(zarr.storage.MemoryStore())
