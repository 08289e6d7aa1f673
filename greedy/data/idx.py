"""IDX files, the format of MNIST and its successors: one array of bytes in each file."""

import gzip
import struct
import zlib
from importlib.resources.abc import Traversable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from greedy.base.errors import UserError
from greedy.data.splits import ArraySplit

UNSIGNED_BYTE = 0x08
NAMES = tuple(
    f"{split}-{kind}-ubyte"
    for split in ("train", "t10k")
    for kind in ("images-idx3", "labels-idx1")
)


def find(folder: Traversable, name: str) -> Traversable | None:
    """Returns the file ``name`` in the folder, plain or with ``.gz``; None where there is
    neither."""
    candidates = (folder / name, folder / f"{name}.gz")
    return next((file for file in candidates if file.is_file()), None)


def is_complete(folder: Traversable) -> bool:
    """Returns whether the folder has images and labels of both splits."""
    return all(find(folder, name) for name in NAMES)


def read_splits(folder: Traversable) -> tuple[ArraySplit, ArraySplit]:
    """Returns the training and the test split of a complete folder: uint8 images (N, 1, H, W)."""
    images, labels, test_images, test_labels = (_read(folder, name) for name in NAMES)
    return ArraySplit(images[:, None], labels), ArraySplit(test_images[:, None], test_labels)


def _read(folder: Traversable, name: str) -> NDArray[Any]:
    file = find(folder, name)
    if file is None:
        raise UserError(f"{folder} has neither {name} nor {name}.gz: put one there")
    raw = file.read_bytes()
    try:
        return parse(gzip.decompress(raw) if file.name.endswith(".gz") else raw)
    except (ValueError, EOFError, OSError, zlib.error, struct.error) as error:
        raise UserError(f"{file} is damaged ({error}): delete it and fetch it again") from error


def parse(raw: bytes) -> NDArray[np.uint8]:
    """Returns the array of an IDX file: two zero bytes, type, number of axes n, n big-endian
    lengths, data.

    Raises ``ValueError`` or ``struct.error`` for other bytes.
    """
    zeros, kind, axes = struct.unpack_from(">HBB", raw)
    if zeros or kind != UNSIGNED_BYTE:
        raise ValueError("not an IDX file of bytes")
    shape = struct.unpack_from(f">{axes}I", raw, 4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * axes).reshape(shape)
