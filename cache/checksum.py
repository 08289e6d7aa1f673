"""The CRC32C that Zarr's stores use, from the fastest library that is installed."""

from typing import Any

from numpy.typing import NDArray

try:
    from fastcrc.crc32 import iscsi as _crc32c  # the first protocol that used it
except ImportError:  # a processor for which there is no wheel
    from google_crc32c import value as _crc32c


def crc32c(data: bytes | NDArray[Any]) -> int:
    """Computes the CRC32C of bytes, or of those of a C-contiguous array, without copying them.

    Raises:
        ValueError: the array is not C-contiguous.
    """
    return _crc32c(data)  # type: ignore[arg-type,unused-ignore] # a Buffer from 3.12 on
