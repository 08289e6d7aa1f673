"""Where rows lie: rows in chunks, chunks in shards, shards in files."""

from dataclasses import dataclass

from .encodings import Encoding

CHUNK_FLOAT32_BYTES = 4 * 2**20
MAX_CHUNK_ROWS = 1024
# Uncompressed; with Blosc a shard is then about 128 MiB on disk.
SHARD_STORED_BYTES = 192 * 2**20


@dataclass(frozen=True)
class Layout:
    """A store's array (view, row, *stored_shape), cut into chunks and shards.

    A chunk holds `chunk_rows` rows of one view, the last one padded with zeros; a shard holds
    `shard_rows` rows of one view, a multiple of `chunk_rows`.
    """

    views: int
    rows: int
    chunk_rows: int
    shard_rows: int

    @classmethod
    def fit(cls, views: int, rows: int, encoding: Encoding) -> "Layout":
        """The layout of a new store. Rows a chunk follow from the float32 size of a row, so all
        encodings share one order of an epoch."""
        fitting = min(CHUNK_FLOAT32_BYTES // (4 * encoding.row_size), MAX_CHUNK_ROWS)
        chunk_rows = 1 << max(fitting, 1).bit_length() - 1
        chunk_bytes = chunk_rows * encoding.stored_row_bytes
        shard_chunks = min(max(SHARD_STORED_BYTES // chunk_bytes, 1), -(-rows // chunk_rows))
        return cls(views, rows, chunk_rows, shard_chunks * chunk_rows)

    @property
    def chunks(self) -> int:
        """Chunks of one view."""
        return -(-self.rows // self.chunk_rows)

    @property
    def shards(self) -> int:
        """Shards of one view."""
        return -(-self.rows // self.shard_rows)

    @property
    def shard_chunks(self) -> int:
        """Entries in a shard's index, of which the last shard may leave some empty."""
        return self.shard_rows // self.chunk_rows

    def rows_in(self, chunk: int) -> int:
        """Rows of a chunk that are not padding."""
        return min(self.chunk_rows, self.rows - chunk * self.chunk_rows)

    def chunks_in(self, shard: int) -> int:
        """Chunks of a shard that lie inside the array."""
        return min(self.shard_chunks, self.chunks - shard * self.shard_chunks)
