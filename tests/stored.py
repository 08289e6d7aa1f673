"""Small stores."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from greedy.cache import StoreWriter, fit_encoding


def write_store(
    path: Path,
    values: NDArray[np.float32],
    encoding: str = "float32",
    compressor: str = "lz4",
    **options: Any,
) -> Path:
    """Writes values (views, rows, ...) as a store. Returns its path. Labels are 0, 1 and 2 in turn
    unless they are given."""
    views, rows = values.shape[:2]
    options = {"labels": np.arange(rows) % 3, "index": np.arange(rows)} | options
    fitted = fit_encoding(encoding, values[0])
    with StoreWriter(
        path, rows=rows, views=views, encoding=fitted, compressor=compressor, **options
    ) as writer:
        for view in values:
            writer.append(view)
    return path
