"""The checksum is CRC32C, whichever library computes it."""

import subprocess
import sys
from pathlib import Path

import google_crc32c
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from stored import write_store

from greedy.cache import Store
from greedy.cache.checksum import crc32c

# RFC 3720, B.4.
PUBLISHED = {
    "zeros": (bytes(32), 0x8A9136AA),
    "ones": (b"\xff" * 32, 0x62A8AB43),
    "ascending": (bytes(range(32)), 0x46DD794E),
    "descending": (bytes(range(31, -1, -1)), 0x113FDB5C),
    "iscsi-read": (
        bytes.fromhex(
            "01c00000 00000000 00000000 00000000 14000000 00000400"
            "00000014 00000018 28000000 00000000 02000000 00000000"
        ),
        0xD9963A56,
    ),
}


@pytest.mark.parametrize(("data", "expected"), PUBLISHED.values(), ids=PUBLISHED)
def test_published_vectors(data: bytes, expected: int) -> None:
    assert crc32c(data) == expected
    assert google_crc32c.value(data) == expected


@given(st.integers(0, 2**17), st.integers(0, 70), st.booleans(), st.integers(0, 2**32 - 1))
def test_both_libraries_agree(size: int, offset: int, writeable: bool, seed: int) -> None:
    """Over lengths on both sides of those at which they change their ways, and alignments."""
    data = np.random.default_rng(seed).integers(0, 256, offset + size, np.uint8)[offset:]
    data.flags.writeable = writeable
    assert crc32c(data) == crc32c(data.tobytes()) == google_crc32c.value(data)
    assert crc32c(data[: size // 4 * 4].view("<f4")) == google_crc32c.value(data[: size // 4 * 4])


@pytest.mark.parametrize("checksum", [crc32c, google_crc32c.value])
def test_bytes_that_are_not_in_sequence_are_refused(checksum: object) -> None:
    assert callable(checksum)
    data = np.arange(4096, dtype=np.uint8).reshape(64, 64)
    for other in (data[:, ::2], data[::2], data[:, :9], data.T):
        with pytest.raises(ValueError, match="contiguous"):
            checksum(other)


WITHOUT_FASTCRC = """
import sys
sys.modules["fastcrc"] = None
from greedy.cache import Store
assert "google_crc32c" in sys.modules
print(Store(sys.argv[1]).load().sum())
"""


def test_a_store_is_read_where_fastcrc_is_missing(tmp_path: Path) -> None:
    values = np.arange(40, dtype=np.float32).reshape(1, 8, 5)
    write_store(tmp_path / "s", values)
    command = [sys.executable, "-c", WITHOUT_FASTCRC, str(tmp_path / "s")]
    read = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (read.stdout.strip(), read.stderr) == (str(Store(tmp_path / "s").load().sum()), "")
