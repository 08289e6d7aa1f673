"""What a store holds, and that no damage to it goes unnoticed."""

import json
import shutil
from itertools import product
from pathlib import Path

import google_crc32c
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from stored import write_store

from greedy.cache import (
    COMPRESSORS,
    ENCODINGS,
    DamagedStore,
    Layout,
    Store,
    StoreError,
    store_info,
    verify,
)
from greedy.cache.inspection import SAMPLE_CHUNKS

VIEWS, ROWS = 2, 22
LAYOUT = Layout(VIEWS, ROWS, chunk_rows=4, shard_rows=16)  # shards of 4 chunks and of 2


def activations() -> NDArray[np.float32]:
    values = np.random.default_rng(0).standard_normal((VIEWS, ROWS, 3, 2, 3)).astype(np.float32)
    return np.maximum(values, 0.01 * values)


def files(path: Path) -> list[Path]:
    return sorted(file for file in path.rglob("*") if file.is_file())


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("stores")
    values, kinds = activations(), product(ENCODINGS, COMPRESSORS)
    return [write_store(root / "-".join(kind), values, *kind, layout=LAYOUT) for kind in kinds]


def test_whole_stores_have_no_damage(stores: list[Path]) -> None:
    for path in stores:
        assert verify(path) == []


def flipped(before: bytes, bit: int) -> bytes:
    after = bytearray(before)
    after[bit // 8] ^= 1 << bit % 8
    return bytes(after)


def harmless(file: Path, before: bytes) -> bool:
    """Returns whether a flipped bit leaves a store as it was. Only in metadata can it do so, if the
    JSON document stays equal, as with `e` and `E` in 1e-05; everything else, chunks, padding and
    unused index entries included, is under a checksum."""
    try:
        return file.name == "zarr.json" and json.loads(file.read_bytes()) == json.loads(before)
    except ValueError:
        return False


@settings(deadline=None, max_examples=200)
@given(data=st.data())
def test_every_flipped_bit_is_reported(stores: list[Path], data: st.DataObject) -> None:
    path = data.draw(st.sampled_from(stores))
    file = data.draw(st.sampled_from(files(path)))
    before = file.read_bytes()
    file.write_bytes(flipped(before, data.draw(st.integers(0, 8 * len(before) - 1))))
    try:
        damages = verify(path)
        if harmless(file, before):
            assert damages == []
        else:
            (damage,) = damages
            assert str(file.relative_to(path)) in f"{damage.path} {damage.problem}"
    finally:
        file.write_bytes(before)


@settings(deadline=None, max_examples=100)
@given(data=st.data())
def test_no_store_is_read_differently(stores: list[Path], data: st.DataObject) -> None:
    """A flip in the metadata is refused unless what is read stays the same."""

    def read(path: Path) -> tuple[Layout, str, str]:
        store = Store(path)
        return store.layout, json.dumps(store.encoding.to_json()), store.compressor

    path = data.draw(st.sampled_from(stores))
    file = path / data.draw(st.sampled_from(["zarr.json", "activations/zarr.json"]))
    before, expected = file.read_bytes(), read(path)
    file.write_bytes(flipped(before, data.draw(st.integers(0, 8 * len(before) - 1))))
    try:
        assert read(path) == expected
    except StoreError:
        pass
    finally:
        file.write_bytes(before)


@pytest.fixture
def damaged(stores: list[Path], tmp_path: Path) -> Path:
    """Returns a copy of a uint8 store with lz4, to be damaged."""
    return shutil.copytree(stores[ENCODINGS.index("uint8") * len(COMPRESSORS)], tmp_path / "s")


def found_in(path: Path) -> list[tuple[str, str]]:
    return [(str(damage.path.relative_to(path)), damage.problem) for damage in verify(path)]


def flip(file: Path, *places: int) -> None:
    for place in places:
        file.write_bytes(flipped(file.read_bytes(), 8 * place))


def chunk_spans(shard: Path) -> list[tuple[int, int]]:
    index = np.frombuffer(shard.read_bytes()[-4 - 16 * 4 : -4], "<u8").reshape(4, 2)
    return [(int(offset), int(size)) for offset, size in index]


def test_all_damages_are_named(damaged: Path) -> None:
    whole, missing, cut = (
        damaged / "activations" / f"c.{key}.0.0.0" for key in ("0.0", "0.1", "1.1")
    )
    flip(whole, *(chunk_spans(whole)[place][0] + 20 for place in (1, 3)))
    missing.unlink()
    cut.write_bytes(cut.read_bytes()[:-1])
    flip(damaged / "labels" / "c.0", 3)
    (damaged / "index" / "c.0").unlink()
    (damaged / "index" / "zarr.json").write_text("{}")
    assert found_in(damaged) == [
        ("labels/c.0", "it does not match its checksum"),
        ("index/c.0", "is missing"),
        ("index/zarr.json", "is not what was written"),
        ("activations/c.0.0.0.0.0", "chunk 1 of view 0 does not match its checksum"),
        ("activations/c.0.0.0.0.0", "chunk 3 of view 0 does not match its checksum"),
        ("activations/c.0.1.0.0.0", "is missing"),
        (
            "activations/c.1.1.0.0.0",
            "every chunk is in a shard whose index does not match its checksum",
        ),
    ]


def test_a_chunk_of_another_shape_is_damage(damaged: Path) -> None:
    shard = damaged / "activations" / "c.1.0.0.0.0"
    offset, size = chunk_spans(shard)[2]
    data = bytearray(shard.read_bytes())
    data[offset + 4] ^= 1  # uncompressed size, in the Blosc header
    body = bytes(data[offset : offset + size - 4])
    data[offset + size - 4 : offset + size] = google_crc32c.value(body).to_bytes(4, "little")
    shard.write_bytes(data)
    ((name, what),) = found_in(damaged)
    assert name == "activations/c.1.0.0.0.0"
    assert what.startswith("chunk 2 of view 1 has a Blosc header")


def test_other_rows_in_labels_are_damage(damaged: Path, stores: list[Path]) -> None:
    other = write_store(damaged.parent / "other", activations()[:, : ROWS - 1], "uint8")
    shutil.copy(other / "labels" / "c.0", damaged / "labels" / "c.0")
    assert found_in(damaged) == [("labels/c.0", "does not have 22 rows")]


def test_without_metadata_labels_are_still_checked(damaged: Path) -> None:
    (damaged / "zarr.json").unlink()
    (damaged / "activations" / "zarr.json").write_text("{")
    flip(damaged / "labels" / "c.0", 0)
    assert [name for name, _ in found_in(damaged)] == [
        "zarr.json",
        "activations/zarr.json",
        "labels/c.0",
    ]


def test_what_cannot_be_read_is_damage(damaged: Path) -> None:
    shard = damaged / "activations" / "c.0.0.0.0.0"
    shard.unlink()
    shard.mkdir()
    assert found_in(damaged) == [("activations/c.0.0.0.0.0", "cannot be read: Is a directory")]


@pytest.mark.parametrize("compressor", COMPRESSORS)
def test_a_store_described(tmp_path: Path, compressor: str) -> None:
    values = np.zeros((2, 40, 50), np.float32)
    values[0, :10] = -1
    values[1, :20] = 3
    path = write_store(tmp_path / "s", values, compressor=compressor)
    info = store_info(Store(path))
    size = sum(file.stat().st_size for file in files(path))
    assert (info.rows, info.views, info.row_shape) == (40, 2, (50,))
    assert (info.encoding, info.compressor, info.sampled_rows) == ("float32", compressor, 80)
    assert (info.disk_bytes, info.bytes_per_value) == (size, size / 4000)
    assert (info.minimum, info.maximum, info.zeros, info.negatives) == (-1, 3, 50 / 80, 10 / 80)
    assert (info.edges[0], info.edges[-1], len(info.edges)) == (-1, 3, len(info.histogram) + 1)
    bins = np.digitize([-1, 0, 3], info.edges[:-1]) - 1
    assert np.array_equal(np.array(info.histogram)[bins], [10 / 80, 50 / 80, 20 / 80])
    assert sum(info.histogram) == 1


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_described_values_are_decoded(tmp_path: Path, encoding: str) -> None:
    path = write_store(tmp_path / "s", activations(), encoding, layout=LAYOUT)
    store, info = Store(path), store_info(Store(path))
    decoded = store.encoding.decode_array(store.load().reshape(-1, *store.encoding.stored_shape))
    assert (info.minimum, info.maximum) == (decoded.min(), decoded.max())
    assert info.zeros == np.mean(decoded == 0)
    assert info.negatives == np.mean(decoded < 0)
    assert sum(info.histogram) == pytest.approx(1)


def test_a_description_samples_all_views(tmp_path: Path) -> None:
    values = np.zeros((3, 40, 2, 512, 512), np.float32)  # two rows a chunk
    values += np.arange(3, dtype=np.float32)[:, None, None, None, None]
    info = store_info(Store(write_store(tmp_path / "s", values)))
    assert info.sampled_rows == 2 * SAMPLE_CHUNKS < 3 * 40
    assert (info.minimum, info.maximum) == (0, 2)
    assert info.zeros == pytest.approx(1 / 3, abs=0.03)


def test_equal_values_are_described(tmp_path: Path) -> None:
    info = store_info(Store(write_store(tmp_path / "s", np.zeros((1, 5, 4), np.float32), "uint8")))
    assert (info.minimum, info.maximum, info.zeros, sum(info.histogram)) == (0, 0, 1, 1)


def test_a_damaged_store_is_not_described(damaged: Path) -> None:
    shard = damaged / "activations" / "c.0.0.0.0.0"
    flip(shard, chunk_spans(shard)[0][0] + 20)
    with pytest.raises(DamagedStore, match="chunk 0 of view 0"):
        store_info(Store(damaged))
