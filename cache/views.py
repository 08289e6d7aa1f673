"""Replacing one view of a finished store."""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from greedy.cache.reader import Store
from greedy.cache.shards import store_digest
from greedy.cache.sources import LocalSource
from greedy.cache.writer import StoreSummary


def store_with_view(
    store: Path, view: int, other: Path, to: Path, shards: Sequence[str]
) -> StoreSummary:
    """Makes a store like another, but for one view.

    Files are linked where the file system has hard links, and copied elsewhere. No file of either
    store is changed.

    Args:
        store: the directory of the store.
        view: to be replaced.
        other: the directory of a store of one view, with the same rows and encoding.
        to: the directory to be made, empty.
        shards: the digests of the new store's shards, as in ``StoreSummary``, which are believed.
    """
    opened = Store(store)
    layout, metadata = opened.layout, opened.metadata
    for path in sorted(store.rglob("*")):
        if path.is_file() and path.suffix != ".part":
            _link(path, to / path.relative_to(store))
    for shard in range(layout.shards):
        place = to / metadata.shard_key(view, shard)
        place.unlink()
        _link(other / metadata.shard_key(0, shard), place)
    return StoreSummary(
        disk_bytes=LocalSource(to).total_bytes(),
        values=layout.views * layout.rows * metadata.encoding.row_size,
        digest=store_digest((opened.labels, opened.index), map(bytes.fromhex, shards)),
        shards=tuple(shards),
    )


def _link(path: Path, to: Path) -> None:
    to.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(path, to)
    except OSError:  # no hard links, or no more of them
        shutil.copyfile(path, to)
