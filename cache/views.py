"""Replacing one view of a finished store."""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from greedy.cache.objects import Objects
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
    for path in sorted(store.rglob("*")):
        if path.is_file() and path.suffix != ".part":
            _link(path, to / path.relative_to(store))
    for shard in range(opened.layout.shards):
        place = to / opened.metadata.shard_key(view, shard)
        place.unlink()
        _link(other / opened.metadata.shard_key(0, shard), place)
    return _summary(opened, LocalSource(to).total_bytes(), shards)


def exchange_view(store: str, view: int, other: str, shards: Sequence[str]) -> StoreSummary:
    """Replaces a view of a store in object storage by copies inside it, one shard after the other.

    Meanwhile some shards are of the old and some of the new view.

    Args:
        store: its URL.
        view: to be replaced.
        other: the URL of a store of one view in the same bucket, with the same rows and encoding.
        shards: as ``store_with_view`` has them.
    """
    opened, objects, others = Store(store), Objects.at(store), Objects.at(other)
    for shard in range(opened.layout.shards):
        key, other_key = (opened.metadata.shard_key(place, shard) for place in (view, 0))
        objects.copy(key, others, other_key)
    return _summary(opened, objects.total_bytes(), shards)


def _summary(store: Store, disk_bytes: int, shards: Sequence[str]) -> StoreSummary:
    return StoreSummary(
        disk_bytes=disk_bytes,
        values=store.views * store.rows * store.encoding.row_size,
        digest=store_digest((store.labels, store.index), map(bytes.fromhex, shards)),
        shards=tuple(shards),
    )


def _link(path: Path, to: Path) -> None:
    to.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(path, to)
    except OSError:  # no hard links, or no more of them
        shutil.copyfile(path, to)
