"""Damage is found, named, and never read as zeros."""

import struct
from pathlib import Path

import google_crc32c
import numpy as np
import pytest
import zarr
from stored import write_store
from zarr.buffer.cpu import Buffer

from greedy.cache import DamagedStore, Layout, Store

ROWS, CHUNKS = 32, 4  # a shard
SHARD = "activations/c.0.1.0"  # the second: chunks 4 to 7


@pytest.fixture(params=["lz4", "zstd", "none"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    values = np.random.default_rng(0).integers(0, 9, (ROWS, 50)).astype(np.float32)
    layout = Layout(1, ROWS, chunk_rows=4, shard_rows=16)
    write_store(tmp_path / "s", values[None], compressor=request.param, layout=layout)
    assert np.array_equal(Store(tmp_path / "s").load()[0], values)
    return tmp_path / "s"


def sealed(data: bytes) -> bytes:
    return data + struct.pack("<I", google_crc32c.value(bytes(data)))


def index_of(shard: bytes) -> list[list[int]]:
    numbers = struct.unpack(f"<{2 * CHUNKS}Q", shard[-16 * CHUNKS - 4 : -4])
    return [list(numbers[place : place + 2]) for place in range(0, 2 * CHUNKS, 2)]


def with_index(shard: bytes, index: list[list[int]]) -> bytes:
    numbers = [number for entry in index for number in entry]
    return shard[: -16 * CHUNKS - 4] + sealed(struct.pack(f"<{2 * CHUNKS}Q", *numbers))


def check_damaged(path: Path, shard: bytes | None, chunk: int = 5) -> None:
    """Checks that every way of reading reports the chunk, and none those of the other shard."""
    if shard is None:
        (path / SHARD).unlink()
    else:
        (path / SHARD).write_bytes(shard)
    named = rf"{SHARD}: chunk {chunk} of view 0"
    names = {str(f.relative_to(path)): f for f in path.rglob("*") if f.is_file()}
    memory = {name: Buffer.from_bytes(file.read_bytes()) for name, file in names.items()}
    for store in (Store(path), Store(zarr.storage.MemoryStore(memory))):
        store.read_chunk(0, 0)
        with pytest.raises(DamagedStore, match=named):
            store.read_chunk(0, chunk)
        with pytest.raises(DamagedStore, match=named):
            store.read_rows(0, chunk * 4, chunk * 4 + 4)
        with pytest.raises(DamagedStore):
            store.load()
        with pytest.raises(DamagedStore):
            list(store.batches(0, 7))


def test_missing_shard(path: Path) -> None:
    check_damaged(path, None)


def test_empty_index_entry(path: Path) -> None:
    shard = (path / SHARD).read_bytes()
    index = index_of(shard)
    index[1] = [2**64 - 1, 2**64 - 1]
    check_damaged(path, with_index(shard, index))


@pytest.mark.parametrize("entry", [
    [0, 0], [0, 3], [0, 2**40], [2**63, 100], [2**64 - 1, 100], [10**6, 804],
])  # fmt: skip
def test_impossible_index_entry(path: Path, entry: list[int]) -> None:
    shard = (path / SHARD).read_bytes()
    index = index_of(shard)
    index[1] = entry
    check_damaged(path, with_index(shard, index))


def test_flipped_bit_in_a_chunk(path: Path) -> None:
    shard = bytearray((path / SHARD).read_bytes())
    offset, size = index_of(shard)[1]
    shard[offset + size // 2] ^= 16
    check_damaged(path, bytes(shard))


def test_flipped_bit_in_a_chunk_s_checksum(path: Path) -> None:
    shard = bytearray((path / SHARD).read_bytes())
    offset, size = index_of(shard)[1]
    shard[offset + size - 1] ^= 1
    check_damaged(path, bytes(shard))


@pytest.mark.parametrize("place", [-1, -5, -16 * CHUNKS - 4])
def test_flipped_bit_in_the_index(path: Path, place: int) -> None:
    shard = bytearray((path / SHARD).read_bytes())
    shard[place] ^= 1
    check_damaged(path, bytes(shard))


@pytest.mark.parametrize("size", [0, 3, 50])
def test_truncated_shard(path: Path, size: int) -> None:
    check_damaged(path, (path / SHARD).read_bytes()[:size])


@pytest.mark.parametrize("path", ["lz4", "zstd"], indirect=True)
@pytest.mark.parametrize(("field", "value"), [
    (slice(3, 4), struct.pack("<B", 2)),  # type size
    (slice(4, 8), struct.pack("<I", 801)),  # bytes decoded: more than the chunk
    (slice(4, 8), struct.pack("<I", 2**31)),
    (slice(4, 8), struct.pack("<I", 799)),
    (slice(8, 12), struct.pack("<I", 0)),  # block size
    (slice(8, 12), struct.pack("<I", 2**31)),
    (slice(12, 16), struct.pack("<I", 17)),  # bytes encoded
])  # fmt: skip
def test_lying_blosc_header_with_a_right_checksum(path: Path, field: slice, value: bytes) -> None:
    shard = bytearray((path / SHARD).read_bytes())
    offset, size = index_of(shard)[1]
    body = shard[offset : offset + size - 4]
    body[field] = value
    shard[offset : offset + size] = sealed(body)
    check_damaged(path, bytes(shard))


@pytest.mark.parametrize("name", ["labels", "index"])
def test_damaged_labels_or_index(path: Path, name: str) -> None:
    file = path / name / "c.0"
    whole = file.read_bytes()
    for data in (whole[:-1], b"", sealed(whole[:-12]), whole[:5] + b"\1" + whole[6:]):
        file.write_bytes(data)
        with pytest.raises(DamagedStore, match=name):
            Store(path)
    file.unlink()
    with pytest.raises(DamagedStore, match=f"{name} is missing"):
        Store(path)
