"""The order of an epoch: permutations, mixing, balance, few classes in a batch."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from greedy.cache import limit_classes, row_order, window_chunks, window_order

MODEST = settings(max_examples=60, deadline=None)
SIZES = {
    "seed": st.integers(0, 2**63 - 1),
    "epoch": st.integers(0, 1000),
    "rows": st.integers(1, 300),
    "views": st.integers(1, 5),
}


@MODEST
@given(**SIZES)
def test_rows_come_once(seed: int, epoch: int, rows: int, views: int) -> None:
    order = row_order(seed=seed, epoch=epoch, rows=rows, views=views)
    assert sorted(order.rows.tolist()) == list(range(rows))
    assert order.views.min() >= 0
    assert order.views.max() < views
    again = row_order(seed=seed, epoch=epoch, rows=rows, views=views)
    assert (again.rows.tolist(), again.views.tolist()) == (
        order.rows.tolist(),
        order.views.tolist(),
    )


@MODEST
@given(**SIZES, chunk_rows=st.sampled_from([1, 4, 32]), window=st.integers(1, 20))
def test_windows_hold_whole_chunks_once(
    seed: int, epoch: int, rows: int, views: int, chunk_rows: int, window: int
) -> None:
    order = window_order(
        seed=seed, epoch=epoch, rows=rows, views=views, chunk_rows=chunk_rows, window=window
    )
    assert sorted(order.rows.tolist()) == list(range(rows))
    assert sorted(order.chunks.tolist()) == list(range(-(-rows // chunk_rows)))
    view_of = dict(zip(order.chunks.tolist(), order.chunk_views.tolist(), strict=True))
    chunk_of = order.rows // chunk_rows
    assert order.views.tolist() == [view_of[chunk] for chunk in chunk_of.tolist()]
    first_chunk = first_row = 0
    for end, row_end in zip(order.ends.tolist(), order.row_ends.tolist(), strict=True):
        here = set(chunk_of[first_row:row_end].tolist())
        assert here == set(order.chunks[first_chunk:end].tolist())
        assert row_end - first_row >= min(window * chunk_rows, rows)
        first_chunk, first_row = end, row_end
    assert first_row == rows


@MODEST
@given(st.integers(1, 300), st.integers(1, 40))
def test_batches_cut_the_order(rows: int, size: int) -> None:
    batches = row_order(seed=1, epoch=0, rows=rows, views=1).batches(size)
    assert np.concatenate(batches).tolist() == list(range(rows))
    assert all(len(batch) == size for batch in batches[:-1])
    assert len(batches[-1]) <= size + 1
    assert rows == 1 or len(batches[-1]) > 1


@pytest.mark.parametrize("kind", ["rows", "window"])
def test_every_view_once_in_as_many_epochs(kind: str) -> None:
    rows, views = 100, 4
    for cycle in range(3):
        seen = np.zeros((rows, views), int)
        for epoch in range(cycle * views, (cycle + 1) * views):
            if kind == "rows":
                order = row_order(seed=5, epoch=epoch, rows=rows, views=views)
            else:
                order = window_order(
                    seed=5, epoch=epoch, rows=rows, views=views, chunk_rows=8, window=4
                )
            counts = np.bincount(order.views, minlength=views)
            assert (counts > 0).all()  # drawn row by row or chunk by chunk, not all alike
            seen[order.rows, order.views] += 1
        assert (seen == 1).all()


def test_epochs_seeds_and_cycles_differ() -> None:
    orders = [
        row_order(seed=seed, epoch=epoch, rows=50, views=2) for seed in (1, 2) for epoch in range(4)
    ]
    assert len({tuple(order.rows) for order in orders}) == 8
    by_row = [order.views[np.argsort(order.rows)] for order in orders]
    assert len({tuple(views) for views in by_row}) == 8


def test_window_is_of_4096_rows_but_of_16_to_64_chunks() -> None:
    assert [window_chunks(rows) for rows in (1, 100, 256, 512, 1024)] == [64, 41, 16, 16, 16]
    assert window_chunks(512, rows=8192) == 16
    assert window_chunks(128, rows=8192) == 64


def test_rows_of_a_chunk_seldom_meet_in_a_batch() -> None:
    window, chunk_rows, size = 16, 32, 64
    same = pairs = 0
    for epoch in range(5):
        order = window_order(
            seed=3, epoch=epoch, rows=window * chunk_rows * 4, views=1,
            chunk_rows=chunk_rows, window=window,
        )  # fmt: skip
        for batch in order.batches(size):
            counts = np.bincount(order.rows[batch] // chunk_rows)
            same += int((counts * (counts - 1)).sum())
            pairs += len(batch) * (len(batch) - 1)
    assert same / pairs <= 1.2 / window


def test_place_of_a_chunk_in_the_epoch_is_uniform() -> None:
    chunks, window, epochs = 40, 4, 200
    table = np.zeros((chunks, chunks // window), int)
    for epoch in range(epochs):
        order = window_order(
            seed=11, epoch=epoch, rows=chunks * 4, views=1, chunk_rows=4, window=window
        )
        for number, members in enumerate(np.split(order.chunks, order.ends[:-1])):
            table[members, number] += 1
    # Each epoch fills every column with exactly `window`, which narrows the counts.
    statistic = ((table - epochs / table.shape[1]) ** 2 / (epochs / table.shape[1])).sum()
    statistic *= (chunks - 1) / chunks
    freedom = (chunks - 1) * (table.shape[1] - 1)
    assert 0.001 < stats.chi2.sf(statistic, freedom) < 0.999


def test_first_row_of_an_epoch_is_uniform() -> None:
    firsts = [row_order(seed=9, epoch=epoch, rows=10, views=1).rows[0] for epoch in range(500)]
    assert stats.chisquare(np.bincount(firsts, minlength=10)).pvalue > 0.001


@MODEST
@given(
    st.lists(st.integers(0, 30), min_size=1, max_size=400), st.integers(2, 50), st.integers(1, 30)
)
def test_limited_classes_take_every_row_once(labels: list[int], size: int, classes: int) -> None:
    batches = limit_classes(np.array(labels), size, classes)
    assert sorted(np.concatenate(batches).tolist()) == list(range(len(labels)))
    assert all(len(batch) == size for batch in batches[:-1])
    assert len(labels) == 1 or len(batches[-1]) > 1


def test_limited_classes_follow_the_published_procedure() -> None:
    # Two samples of class 0, then look ahead: a sample each of classes 1 to 9, skipping 0s
    # and the second 1; then from the front whatever has these classes; 99 must wait.
    labels = np.array([0, 0, 1, 1, 2, 3, 4, 5, 6, 7, 8, 9, 99, 0, 9, 2])
    first, second = limit_classes(labels, size=13, classes=2)
    assert sorted(labels[first].tolist()) == [0, 0, 0, 1, 1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert second.tolist() == [12, 14, 15]


def test_limited_classes_of_a_hundred() -> None:
    counts = []
    for seed in range(3):
        balanced = np.repeat(np.arange(100), 500)
        labels = np.random.default_rng(seed).permutation(balanced)
        batches = limit_classes(labels, size=128, classes=20)
        counts.append([len(np.unique(labels[batch])) for batch in batches])
    assert np.mean([np.mean(count) for count in counts]) == pytest.approx(13.6, abs=0.15)
    assert min(map(min, counts)) == 10
    assert max(map(max, counts)) <= 60


def test_limited_classes_stay_within_their_window() -> None:
    labels = np.random.default_rng(0).integers(0, 50, 1000)
    order = window_order(seed=0, epoch=0, rows=1000, views=1, chunk_rows=10, window=25)
    batches = order.limited_batches(labels, size=32, classes=5)
    assert sorted(np.concatenate(batches).tolist()) == list(range(1000))
    windows = [set(np.searchsorted(order.row_ends, batch, side="right")) for batch in batches]
    assert all(len(window) == 1 for window in windows)
    assert [min(window) for window in windows] == sorted(min(window) for window in windows)
