"""The activation store: encodings, writer, reader, integrity.

Knows arrays, never networks. A store is a plain Zarr v3 group of ``activations`` (view, row, ...),
``labels`` and ``index`` that any Zarr library opens.
"""

from greedy.cache.chunk_cache import ChunkCache, open_chunk_cache
from greedy.cache.encodings import ENCODINGS, Encoding, fit_encoding, pixel_encoding
from greedy.cache.errors import DamagedStore, NonFiniteActivation, StoreError, UnreachableStore
from greedy.cache.inspection import StoreInfo, store_info
from greedy.cache.layout import Layout
from greedy.cache.loader import BatchLoader, StoredBatch
from greedy.cache.objects import require_writable
from greedy.cache.order import (
    LIMITED_WINDOW_ROWS,
    EpochOrder,
    WindowOrder,
    limit_classes,
    row_order,
    window_chunks,
    window_order,
)
from greedy.cache.reader import Store
from greedy.cache.shards import COMPRESSORS
from greedy.cache.targets import remove_tree
from greedy.cache.urls import location_of, put_elsewhere
from greedy.cache.verification import Damage, verify
from greedy.cache.views import exchange_view, store_with_view
from greedy.cache.writer import StoreSummary, StoreWriter

__all__ = [
    "ENCODINGS",
    "COMPRESSORS",
    "Encoding",
    "fit_encoding",
    "pixel_encoding",
    "Layout",
    "StoreWriter",
    "StoreSummary",
    "Store",
    "ChunkCache",
    "open_chunk_cache",
    "store_with_view",
    "exchange_view",
    "location_of",
    "put_elsewhere",
    "require_writable",
    "remove_tree",
    "EpochOrder",
    "WindowOrder",
    "row_order",
    "window_order",
    "window_chunks",
    "LIMITED_WINDOW_ROWS",
    "limit_classes",
    "StoredBatch",
    "BatchLoader",
    "StoreInfo",
    "store_info",
    "Damage",
    "verify",
    "StoreError",
    "DamagedStore",
    "NonFiniteActivation",
    "UnreachableStore",
]
