"""A store's Zarr v3 metadata: written from a layout, and checked against one when read.

The files of a store are the group's ``zarr.json`` and, for each of the arrays ``activations``,
``labels`` and ``index``, a ``zarr.json`` and the data. Any Zarr v3 library opens them.
"""

import json
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from greedy.cache.checksum import crc32c
from greedy.cache.encodings import Encoding
from greedy.cache.errors import DamagedStore, StoreError
from greedy.cache.layout import Layout
from greedy.cache.shards import BLOSC_LEVEL, COMPRESSORS, MAX_CHUNK_BYTES

FORMAT = 1
SIDE_ARRAYS = ("labels", "index")
MAX_VIEWS = 2**16
MAX_ROWS = 2**40
MAX_SHARD_CHUNKS = 2**20

_AXES = {1: ["feature"], 2: ["token", "feature"], 3: ["channel", "height", "width"]}
_FORMER_AXES = ["view", "row", "feature"]  # of tokens, one too few for Zarr
_CRC32C = {"name": "crc32c"}
_BYTES = {"name": "bytes", "configuration": {"endian": "little"}}


@dataclass(frozen=True)
class StoreMetadata:
    """The metadata of a store.

    Attributes:
        layout: how rows are divided into chunks and shards.
        encoding: how values are stored.
        compressor: "lz4", "zstd" or "none".
    """

    layout: Layout
    encoding: Encoding
    compressor: str

    @cached_property
    def chunk_shape(self) -> tuple[int, ...]:
        """The shape of a stored chunk, without the view's axis."""
        return (self.layout.chunk_rows, *self.encoding.stored_shape)

    @cached_property
    def chunk_bytes(self) -> int:
        """Bytes of a chunk before compression."""
        return self.layout.chunk_rows * self.encoding.stored_row_bytes

    def shard_key(self, view: int, shard: int) -> str:
        """Returns the path of a shard's file, relative to the store."""
        zeros = ".".join("0" * len(self.encoding.stored_shape))
        return f"activations/c.{view}.{shard}.{zeros}"

    def documents(self) -> dict[str, bytes]:
        """Returns the contents of every ``zarr.json`` by its path, the group's last."""
        documents = {f"{name}/zarr.json": _side_array(self.layout.rows) for name in SIDE_ARRAYS}
        documents["activations/zarr.json"] = _activations(self)
        documents["zarr.json"] = {
            "zarr_format": 3,
            "node_type": "group",
            "attributes": {"greedy": _attributes(self, documents["activations/zarr.json"])},
        }
        return {path: json.dumps(entry, indent=1).encode() for path, entry in documents.items()}


def parse_metadata(group: bytes, activations: bytes, where: str) -> StoreMetadata:
    """Returns the metadata of a store.

    Args:
        group: the contents of the group's ``zarr.json``.
        activations: the contents of the activations' ``zarr.json``.
        where: the store, for messages.

    The files may come from a stranger: sizes in them are bounded, and everything else must be
    exactly what this version writes.

    Raises:
        StoreError: they do not describe a store.
        DamagedStore: they do not match their checksum.
    """
    attributes = _object(group, where).get("attributes", {})
    attributes = attributes.get("greedy") if isinstance(attributes, dict) else None
    array = _object(activations, f"{where}/activations")
    if not isinstance(attributes, dict):
        raise StoreError(f"{where} is a Zarr group but not an activation store")
    if attributes.get("format") != FORMAT:
        raise StoreError(
            f"{where} has format {attributes.get('format')!r}, this version reads format {FORMAT}; "
            "write the store again"
        )
    try:
        row_shape = tuple(_bounded(side, MAX_CHUNK_BYTES) for side in attributes["row_shape"])
        encoding = Encoding.from_json(attributes["encoding"], row_shape)
        views, rows = _bounded(array["shape"][0], MAX_VIEWS), _bounded(array["shape"][1], MAX_ROWS)
        (codec,) = array["codecs"]
        shard_rows = _bounded(array["chunk_grid"]["configuration"]["chunk_shape"][1], MAX_ROWS)
        chunk_rows = _bounded(codec["configuration"]["chunk_shape"][1], shard_rows)
        compressor = attributes["compressor"]
    except (KeyError, IndexError, TypeError, ValueError, StoreError) as error:
        raise StoreError(f"{where} has metadata that cannot be read: {error}") from error
    if compressor not in COMPRESSORS:
        raise StoreError(f"{where} uses the unknown compressor {compressor!r}")
    metadata = StoreMetadata(Layout(views, rows, chunk_rows, shard_rows), encoding, compressor)
    possible = (
        shard_rows % chunk_rows == 0
        and shard_rows // chunk_rows <= MAX_SHARD_CHUNKS
        and metadata.chunk_bytes <= MAX_CHUNK_BYTES
    )
    expected = _activations(metadata)
    if len(encoding.stored_shape) == 2 and array.get("dimension_names") == _FORMER_AXES:
        expected["dimension_names"] = _FORMER_AXES
    if not possible or any(array.get(key) != value for key, value in expected.items()):
        raise DamagedStore(f"{where}/activations is not laid out as its attributes say")
    if attributes != _attributes(metadata, expected):
        raise DamagedStore(f"{where} has metadata that do not match their checksum")
    return metadata


def _attributes(metadata: StoreMetadata, activations: dict[str, Any]) -> dict[str, Any]:
    """Returns the attributes of a store, with a CRC32C over these and the activations' metadata, so
    that a flipped bit in a scale is noticed."""
    attributes: dict[str, Any] = {
        "format": FORMAT,
        "row_shape": list(metadata.encoding.row_shape),
        "encoding": metadata.encoding.to_json(),
        "compressor": metadata.compressor,
    }
    text = json.dumps([attributes, activations])
    return attributes | {"crc32c": crc32c(text.encode())}


def _activations(metadata: StoreMetadata) -> dict[str, Any]:
    layout, encoding = metadata.layout, metadata.encoding
    dtype, row = encoding.stored_dtype, encoding.stored_shape
    codecs: list[dict[str, Any]] = [_BYTES]
    if metadata.compressor != "none":
        blosc = {
            "typesize": dtype.itemsize,
            "cname": metadata.compressor,
            "clevel": BLOSC_LEVEL,
            "shuffle": "bitshuffle",
            "blocksize": 0,
        }
        codecs.append({"name": "blosc", "configuration": blosc})
    sharding = {
        "chunk_shape": [1, layout.chunk_rows, *row],
        "codecs": [*codecs, _CRC32C],
        "index_codecs": [_BYTES, _CRC32C],
        "index_location": "end",
    }
    axes = ["pair"] if encoding.name == "uint4" else _AXES[len(row)]
    return _array(
        shape=[layout.views, layout.rows, *row],
        dtype=dtype,
        grid=[1, layout.shard_rows, *row],
        codecs=[{"name": "sharding_indexed", "configuration": sharding}],
        axes=["view", "row", *axes],
    )


def _side_array(rows: int) -> dict[str, Any]:
    return _array([rows], np.dtype("<i8"), [rows], [_BYTES, _CRC32C], ["row"])


def _array(
    shape: list[int],
    dtype: np.dtype[Any],
    grid: list[int],
    codecs: list[dict[str, Any]],
    axes: list[str],
) -> dict[str, Any]:
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": shape,
        "data_type": dtype.name,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": grid}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
        "fill_value": 0.0 if dtype.kind == "f" else 0,
        "codecs": codecs,
        "attributes": {},
        "dimension_names": axes,
    }


def _object(text: bytes, where: str) -> dict[str, Any]:
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise StoreError(f"{where}/zarr.json is not JSON") from error
    if not isinstance(document, dict):
        raise StoreError(f"{where}/zarr.json is not a JSON object")
    return document


def _bounded(value: Any, top: int) -> int:
    if type(value) is not int or not 1 <= value <= top:
        raise StoreError(f"{value!r} is not between 1 and {top}")
    return value
