"""The bytes of chunks and shards, written and checked.

A shard is its chunks in index order, then an index of (offset, size) pairs, little-endian
uint64, then the index's CRC32C. A chunk is its stored values, compressed by Blosc or plain,
then their CRC32C. Nothing in a file is believed before its checksum is verified, and nothing
is decoded before the Blosc header agrees with the layout.
"""

import hashlib
import os
import struct
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numcodecs.blosc
import numpy as np
from numpy.typing import NDArray

from greedy.cache.checksum import crc32c
from greedy.cache.errors import DamagedStore
from greedy.cache.files import naming, new_file, part_of, rename

COMPRESSORS = ("lz4", "zstd", "none")
"""The names of all compressors."""
BLOSC_LEVEL = 3
# Blosc's own limit, 2**31 less its overhead, rounded down.
MAX_CHUNK_BYTES = 2**31 - 64

_EMPTY = 2**64 - 1
CRC_BYTES = 4
_BLOSC_HEADER = struct.Struct("<BBBBIII")  # versions, flags, type size; nbytes, blocksize, cbytes


def encode_chunk(stored: NDArray[Any], compressor: str) -> bytes:
    """Returns a chunk's bytes with their CRC32C; equal values give equal bytes on every machine."""
    if compressor == "none":
        body = stored.tobytes()
    else:
        # Blosc's own threads would lay blocks out in completion order.
        numcodecs.blosc.use_threads = False
        body = numcodecs.blosc.compress(
            stored, compressor.encode(), BLOSC_LEVEL, numcodecs.blosc.BITSHUFFLE
        )
    return with_crc(body)


def decode_chunk(data: NDArray[np.uint8], compressor: str, out: NDArray[Any], where: str) -> None:
    """Decodes the bytes of ``encode_chunk`` into ``out``, a whole C-contiguous chunk.

    Raises:
        DamagedStore: the message begins with ``where``.
    """
    body = without_crc(data, where)
    if compressor == "none":
        out.reshape(-1).view(np.uint8)[:] = body
        return
    _check_blosc_header(body, out, where)
    numcodecs.blosc.use_threads = False
    try:
        numcodecs.blosc.decompress(body, out)
    except (RuntimeError, ValueError) as error:
        raise DamagedStore(f"{where} cannot be decompressed") from error


def with_crc(body: bytes) -> bytes:
    """Returns ``body`` followed by its CRC32C."""
    return body + crc32c(body).to_bytes(CRC_BYTES, "little")


def without_crc(data: NDArray[np.uint8], where: str) -> NDArray[np.uint8]:
    """Returns the bytes before the CRC32C that ``with_crc`` added, after verifying it.

    Raises:
        DamagedStore: the checksum does not match; the message begins with ``where``.
    """
    body, crc = data[:-CRC_BYTES], data[-CRC_BYTES:]
    if len(data) < CRC_BYTES or crc32c(body) != int.from_bytes(crc.tobytes(), "little"):
        raise DamagedStore(f"{where} does not match its checksum")
    return body


def index_bytes(chunks: int) -> int:
    """Returns the size of the index at the end of a shard with that many chunks."""
    return 16 * chunks + CRC_BYTES


def parse_index(data: bytes, chunks: int, where: str) -> NDArray[np.uint64]:
    """Returns offsets and sizes, uint64 (chunks, 2), from the last bytes of a shard.

    Raises:
        DamagedStore: the message begins with ``where``.
    """
    if len(data) != index_bytes(chunks):
        raise DamagedStore(f"{where} is in a shard too short for its index")
    body = without_crc(np.frombuffer(data, np.uint8), f"{where} is in a shard whose index")
    return body.view("<u8").reshape(chunks, 2)


def chunk_span(
    index: NDArray[np.uint64], slot: int, chunk_bytes: int, compressor: str, where: str
) -> tuple[int, int]:
    """Returns offset and size of the chunk in ``slot`` of the shard's index.

    Raises:
        DamagedStore: the entry is empty or has an impossible size; the message begins with
            ``where``.
    """
    offset, size = index[slot].tolist()
    if _EMPTY in (offset, size):
        raise DamagedStore(f"{where} is missing from its shard")
    header = _BLOSC_HEADER.size + CRC_BYTES
    plain = chunk_bytes + CRC_BYTES
    least, most = (plain, plain) if compressor == "none" else (header, chunk_bytes + header)
    if offset >= 2**62 or not least <= size <= most:
        raise DamagedStore(f"{where} has an impossible entry in its shard's index")
    return offset, size


def shard_digest(path: Path) -> bytes:
    """Computes the digest that ``ShardWriter.close`` returned for a finished shard."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, hashlib.blake2b).digest()


def store_digest(side_arrays: Iterable[NDArray[np.int64]], shards: Iterable[bytes]) -> str:
    """Computes a store's digest from its labels and index, and from the digests of its shards,
    view by view."""
    digest = hashlib.blake2b()
    for array in side_arrays:
        digest.update(array.astype("<i8").tobytes())
    for shard in shards:
        digest.update(shard)
    return digest.hexdigest()


class ShardWriter:
    """Writes one shard under another name; ``close`` gives it its own.

    Attributes:
        written: number of chunks written so far.
    """

    def __init__(self, path: Path, chunks: int) -> None:
        self._path = path
        self._part = part_of(path)
        self._file = new_file(self._part)
        self._digest = hashlib.blake2b()
        self._index = np.full((chunks, 2), _EMPTY, "<u8")
        self._offset = 0
        self.written = 0

    def append(self, chunk: bytes) -> None:
        """Adds the next chunk in index order."""
        self._index[self.written] = self._offset, len(chunk)
        self._write(chunk)
        self.written += 1

    def close(self) -> bytes:
        """Finishes the shard and returns its digest."""
        self._write(with_crc(self._index.tobytes()))
        with naming(self._path):
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
        rename(self._part, self._path)
        return self._digest.digest()

    def discard(self) -> None:
        """Removes an unfinished shard."""
        with suppress(OSError):  # closing writes the last bytes, which fails on a full disk
            self._file.close()
        self._part.unlink(missing_ok=True)

    def _write(self, data: bytes) -> None:
        with naming(self._path):
            self._file.write(data)
        self._digest.update(data)
        self._offset += len(data)


def _check_blosc_header(body: NDArray[np.uint8], out: NDArray[Any], where: str) -> None:
    _, _, _, typesize, nbytes, blocksize, cbytes = _BLOSC_HEADER.unpack_from(body.data)
    as_expected = (
        typesize == out.itemsize
        and nbytes == out.nbytes
        and 0 < blocksize <= nbytes
        and cbytes == len(body)
    )
    if not as_expected:
        raise DamagedStore(f"{where} has a Blosc header that does not fit the store")
