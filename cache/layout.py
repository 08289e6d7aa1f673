"""The division of a store: rows into chunks, and chunks into shards, one file each."""

from dataclasses import dataclass

from greedy.cache.encodings import Encoding

CHUNK_FLOAT32_BYTES = 4 * 2**20
MAX_CHUNK_ROWS = 1024
# Uncompressed; with Blosc a shard is then about 128 MiB on disk.
SHARD_STORED_BYTES = 192 * 2**20


@dataclass(frozen=True)
class Layout:
    """A store's array (view, row, *stored_shape), cut into chunks and shards.

    A chunk holds ``chunk_rows`` rows of one view, the last one padded with zeros; a shard holds
    ``shard_rows`` rows of one view, a multiple of ``chunk_rows``.
    """

    views: int
    rows: int
    chunk_rows: int
    shard_rows: int

    @classmethod
    def fit(cls, views: int, rows: int, encoding: Encoding) -> "Layout":
        """Returns the layout of a new store. The rows in a chunk follow from the float32 size of a
        row, so that all encodings share one order of an epoch."""
        largest = min(CHUNK_FLOAT32_BYTES // (4 * encoding.row_size), MAX_CHUNK_ROWS)
        chunk_rows = 1 << max(largest, 1).bit_length() - 1
        chunk_bytes = chunk_rows * encoding.stored_row_bytes
        shard_chunks = min(max(SHARD_STORED_BYTES // chunk_bytes, 1), -(-rows // chunk_rows))
        return cls(views, rows, chunk_rows, shard_chunks * chunk_rows)

    @property
    def chunks(self) -> int:
        """Number of chunks in one view."""
        return -(-self.rows // self.chunk_rows)

    @property
    def shards(self) -> int:
        """Number of shards in one view."""
        return -(-self.rows // self.shard_rows)

    @property
    def shard_chunks(self) -> int:
        """Number of entries in a shard's index, of which the last shard may leave some empty."""
        return self.shard_rows // self.chunk_rows

    def rows_in(self, chunk: int) -> int:
        """Returns the number of rows in a chunk that are not padding."""
        return min(self.chunk_rows, self.rows - chunk * self.chunk_rows)

    def chunks_in(self, shard: int) -> int:
        """Counts the chunks of a shard that lie inside the array."""
        return min(self.shard_chunks, self.chunks - shard * self.shard_chunks)
