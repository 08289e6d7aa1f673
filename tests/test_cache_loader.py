"""The loader gives what the order says, from disk and from memory, from any batch on."""

import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from stored import write_store

from greedy.cache import (
    BatchLoader,
    DamagedStore,
    EpochOrder,
    Layout,
    Store,
    row_order,
    window_order,
)
from greedy.cache.order import largest_share

ROWS, VIEWS, CHUNK_ROWS = 203, 3, 8
LABELS = np.random.default_rng(1).integers(0, 20, ROWS)


def write(path: Path, layout: Layout) -> Path:
    values = np.random.default_rng(0).standard_normal((VIEWS, ROWS, 3, 4, 4)).astype(np.float32)
    return write_store(path, values, "uint4", labels=LABELS, layout=layout)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    layout = Layout(VIEWS, ROWS, CHUNK_ROWS, 5 * CHUNK_ROWS)
    return write(tmp_path_factory.mktemp("store") / "train", layout)


def window(rows: int = ROWS, epoch: int = 0, size: int = 4) -> EpochOrder:
    return window_order(
        seed=7, epoch=epoch, rows=rows, views=VIEWS, chunk_rows=CHUNK_ROWS, window=size
    )


def check(loader: BatchLoader, order: EpochOrder, batches: list, values: np.ndarray) -> None:
    assert len(loader) == len(batches)
    for batch, positions in zip(loader, batches, strict=True):
        assert batch.rows.tolist() == order.rows[positions].tolist()
        assert batch.views.tolist() == order.views[positions].tolist()
        assert batch.labels.tolist() == LABELS[batch.rows].tolist()
        np.testing.assert_array_equal(batch.values, values[batch.views, batch.rows])


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from([ROWS, 192, 100, 9, 5]),
    st.integers(0, 5),
    st.integers(1, 30),
    st.sampled_from([3, 16, 33, 150]),
    st.integers(1, 3),
    st.data(),
)
def test_disk_gives_the_order(
    path: Path, rows: int, epoch: int, chunks: int, size: int, threads: int, data: st.DataObject
) -> None:
    store = Store(path)
    order = window(rows, epoch, chunks)
    batches = order.batches(size)
    start = data.draw(st.integers(0, len(batches)))
    loader = BatchLoader(store, LABELS, order, batches[start:], threads=threads)
    check(loader, order, batches[start:], store.load())


@settings(max_examples=25, deadline=None)
@given(st.sampled_from([ROWS, 100, 1]), st.sampled_from([1, 16, 150]), st.data())
def test_memory_gives_the_order(path: Path, rows: int, size: int, data: st.DataObject) -> None:
    store = Store(path)
    values = store.load()
    for order in (row_order(seed=3, epoch=1, rows=rows, views=VIEWS), window(rows)):
        batches = order.batches(size)
        start = data.draw(st.integers(0, len(batches)))
        loader = BatchLoader(values, LABELS, order, batches[start:])
        check(loader, order, batches[start:], values)


def test_limited_classes_from_disk(path: Path) -> None:
    store, order = Store(path), window(size=8)
    batches = order.limited_batches(LABELS, 16, 4)
    check(BatchLoader(store, LABELS, order, batches), order, batches, store.load())


def test_skipped_windows_are_not_read(tmp_path: Path) -> None:
    path = write(tmp_path / "train", Layout(VIEWS, ROWS, CHUNK_ROWS, CHUNK_ROWS))
    store, order = Store(path), window()
    batches, values = order.batches(10), store.load()
    # A file a chunk: remove those of the first window.
    skipped = slice(int(order.ends[0]))
    for chunk, view in zip(order.chunks[skipped], order.chunk_views[skipped], strict=True):
        (path / f"activations/c.{view}.{chunk}.0").unlink()
    start = -(-int(order.row_ends[0]) // 10)
    store = Store(path)
    loader = BatchLoader(store, LABELS, order, batches[start:])
    check(loader, order, batches[start:], values)
    with pytest.raises(DamagedStore, match="missing shard"):
        next(iter(BatchLoader(store, LABELS, order, batches[start - 1 :])))


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 30), st.integers(1, 4), st.sampled_from([3, 16, 150]), st.booleans())
def test_shares_together_are_the_batches(
    path: Path, chunks: int, readers: int, size: int, whole: bool
) -> None:
    store, values = Store(path), Store(path).load()
    order = row_order(seed=3, epoch=1, rows=ROWS, views=VIEWS) if whole else window(size=chunks)
    batches = order.batches(size)
    shares = [order.shares(batch, readers) for batch in batches]
    for batch, places in zip(batches, shares, strict=True):
        assert sorted(np.concatenate(places)) == list(range(len(batch)))
        assert max(map(len, places)) <= largest_share(len(batch), readers)
    for reader in range(readers):
        own = [batch[places[reader]] for batch, places in zip(batches, shares, strict=True)]
        own = [positions for positions in own if len(positions)]
        source = values if whole else store
        check(BatchLoader(source, LABELS, order, own), order, own, values)


def test_a_share_reads_its_chunks_alone(tmp_path: Path) -> None:
    path = write(tmp_path / "train", Layout(VIEWS, ROWS, CHUNK_ROWS, CHUNK_ROWS))
    order, values = window(size=8), Store(path).load()
    batches = order.batches(10)
    own, other = (
        [batch[order.shares(batch, 2)[reader]] for batch in batches] for reader in range(2)
    )
    own, other = ([batch for batch in share if len(batch)] for share in (own, other))
    read = {row // CHUNK_ROWS for batch in own for row in order.rows[batch].tolist()}
    assert 0.4 * len(order.chunks) < len(read) < 0.6 * len(order.chunks)
    for chunk, view in zip(order.chunks, order.chunk_views, strict=True):
        if chunk not in read:  # a file a chunk
            (path / f"activations/c.{view}.{chunk}.0").unlink()
    check(BatchLoader(Store(path), LABELS, order, own), order, own, values)
    with pytest.raises(DamagedStore, match="missing shard"):
        list(BatchLoader(Store(path), LABELS, order, other))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_pinned_batches_decode_alike_on_the_gpu(path: Path) -> None:
    store, order = Store(path), window()
    for batch in BatchLoader(store, LABELS, order, order.batches(32), pin_memory=True):
        assert batch.values.is_pinned()
        decoded = store.encoding.decode(batch.values.to("cuda", non_blocking=True)).cpu().numpy()
        np.testing.assert_array_equal(decoded, store.encoding.decode_array(batch.values.numpy()))


def running() -> list[str]:
    names = [thread.name for thread in threading.enumerate()]
    return [name for name in names if name.startswith("greedy-cache")]


def test_leaving_early_ends_the_threads(path: Path) -> None:
    store, order = Store(path), window()
    for source in (store, store.load()):
        for _ in BatchLoader(source, LABELS, order, order.batches(5)):
            assert running()
            break
        assert not running()
    for _ in store.batches(0, 10):
        assert running()
        break
    assert not running()


def test_order_must_fit_the_source(path: Path) -> None:
    store = Store(path)
    order = row_order(seed=0, epoch=0, rows=ROWS, views=VIEWS)
    with pytest.raises(ValueError, match="window_order"):
        BatchLoader(store, LABELS, order, order.batches(10))
    order = window_order(seed=0, epoch=0, rows=ROWS, views=1, chunk_rows=4, window=4)
    with pytest.raises(ValueError, match="window_order"):
        BatchLoader(store, LABELS, order, order.batches(10))
    order = window(ROWS + 1)
    with pytest.raises(ValueError, match="rows"):
        BatchLoader(store, LABELS, order, order.batches(10))
