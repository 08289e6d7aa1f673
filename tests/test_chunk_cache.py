"""The local cache of chunks of stores that are elsewhere."""

import os
from pathlib import Path

import numpy as np
import pytest
from small_training import files
from test_elsewhere import VALUES, url_of, write

from greedy.cache import DamagedStore, Store, exchange_view, open_chunk_cache


def spoil(there: Path) -> None:
    """Changes every chunk, but no file's identity."""
    for path in there.rglob("c.*.*.0"):
        times = path.stat().st_atime_ns, path.stat().st_mtime_ns
        with path.open("r+b") as file:
            chunks = len(file.read()) - 16 * 4 - 4
            file.seek(0)
            file.write(bytes(chunks))
        os.utime(path, ns=times)


def test_chunks_are_read_from_the_cache_again(tmp_path: Path) -> None:
    here, there = write(tmp_path)
    kept = open_chunk_cache(tmp_path / "kept", 2**20)
    assert np.array_equal(Store(here, kept=kept).load(), VALUES)
    spoil(there)
    assert np.array_equal(Store(here, kept=kept).load(), VALUES)
    with pytest.raises(DamagedStore):
        Store(here).load()


@pytest.mark.parametrize("spoiled", [bytes(100), b"", None], ids=["zeros", "empty", "gone"])
def test_a_chunk_that_is_damaged_in_the_cache_is_fetched_again(
    tmp_path: Path, spoiled: bytes | None
) -> None:
    here, _ = write(tmp_path)
    kept = open_chunk_cache(tmp_path / "kept", 2**20)
    store = Store(here, kept=kept)
    store.load()
    before = files(tmp_path / "kept")
    for path in (p for p in (tmp_path / "kept").rglob("*") if p.is_file()):
        path.unlink() if spoiled is None else path.write_bytes(spoiled[:1] * path.stat().st_size)
    assert np.array_equal(store.load(), VALUES)
    assert files(tmp_path / "kept") == before


def test_the_cache_stays_within_its_limit_and_open_stores_in_it(tmp_path: Path) -> None:
    first, second = write(tmp_path / "a")[0], write(tmp_path / "b", VALUES[:1] + 1)[0]
    limit = 3000
    kept = open_chunk_cache(tmp_path / "kept", limit)

    def used() -> dict[str, int]:
        sizes = {d.name: sum(map(len, files(d).values())) for d in (tmp_path / "kept").iterdir()}
        assert 0 < sum(sizes.values()) <= limit
        return sizes

    opened = Store(first, kept=kept)
    opened.load()
    (of_first,) = used()
    Store(second, kept=kept).load()  # no room beside a store that is open
    assert list(used()) == [of_first]
    del opened
    for _ in range(2):
        assert np.array_equal(Store(second, kept=kept).load(), VALUES[:1] + 1)
    assert of_first not in used()


def test_chunks_of_a_view_that_was_replaced_leave_the_cache(tmp_path: Path) -> None:
    here, there = write(tmp_path / "a")
    _, other = write(tmp_path / "b", VALUES[:1] + 1)
    store = Store(here, kept=open_chunk_cache(tmp_path / "kept", 2**20))
    store.load()
    count = len(files(tmp_path / "kept"))
    exchange_view(url_of(there), 1, url_of(other), [])
    assert np.array_equal(store.reopened().load()[1], VALUES[0] + 1)
    assert len(files(tmp_path / "kept")) == count


def test_a_chunk_that_is_kept_twice_takes_its_room_once(tmp_path: Path) -> None:
    kept = open_chunk_cache(tmp_path / "kept", 100)
    for _ in range(2):
        kept.admit(tmp_path / "kept/store/one", np.zeros(40, np.uint8))
    kept.admit(tmp_path / "kept/store/other", np.zeros(60, np.uint8))
    assert {name: len(data) for name, data in files(tmp_path / "kept/store").items()} == {
        "one": 40,
        "other": 60,
    }
