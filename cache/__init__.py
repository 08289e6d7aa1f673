"""The activation store: encodings, writer, reader, integrity.

Knows arrays, never networks. A store is a plain Zarr v3 group of `activations` (view, row, ...),
`labels` and `index` that any Zarr library opens.
"""

from .encodings import ENCODINGS, Encoding, fit_encoding, pixels
from .errors import DamagedStore, NonFiniteActivation, StoreError
from .inspection import StoreInfo, describe
from .layout import Layout
from .loader import Batch, BatchLoader
from .order import (
    LIMITED_WINDOW_ROWS,
    EpochOrder,
    WindowOrder,
    limit_classes,
    row_order,
    window_chunks,
    window_order,
)
from .reader import Store
from .shards import COMPRESSORS
from .verification import Damage, verify
from .writer import StoreSummary, StoreWriter

__all__ = [
    "ENCODINGS",
    "COMPRESSORS",
    "Encoding",
    "fit_encoding",
    "pixels",
    "Layout",
    "StoreWriter",
    "StoreSummary",
    "Store",
    "EpochOrder",
    "WindowOrder",
    "row_order",
    "window_order",
    "window_chunks",
    "LIMITED_WINDOW_ROWS",
    "limit_classes",
    "Batch",
    "BatchLoader",
    "StoreInfo",
    "describe",
    "Damage",
    "verify",
    "StoreError",
    "DamagedStore",
    "NonFiniteActivation",
]
