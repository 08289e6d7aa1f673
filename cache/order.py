"""The order of one epoch: a pure function of seed, epoch and sizes.

A store in RAM is permuted row by row. A store on disk is read by chunks: they are permuted and
dealt into windows, and the rows of a window are mixed.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

WINDOW_CHUNKS = 16
WINDOW_ROWS = 4096
# Chunks are of at most 4 MiB in float32, and two windows are in memory: 512 MiB at most.
MAX_WINDOW_CHUNKS = 64
LIMITED_WINDOW_ROWS = 8192
"""Rows a window, at least, where batches have limited classes."""

# Limited classes: a batch covers at least MIN_CLASSES, searched for among LOOKAHEAD samples.
MIN_CLASSES = 10
LOOKAHEAD = 200

Positions = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class EpochOrder:
    """Which row of which view stands at each of n positions of an epoch.

    Attributes:
        rows: int64 (n,), every row once.
        views: int64 (n,).
    """

    rows: NDArray[np.int64]
    views: NDArray[np.int64]

    def batches(self, size: int) -> list[Positions]:
        """Positions of each batch; a last batch of a single row joins the one before it."""
        return _cut(np.arange(len(self.rows)), size)

    def limited_batches(
        self, labels: NDArray[np.int64], size: int, classes: int
    ) -> list[Positions]:
        """Positions of each batch by `limit_classes`. `labels` are those of the store's rows."""
        return limit_classes(labels[self.rows], size, classes)


@dataclass(frozen=True, eq=False)
class WindowOrder(EpochOrder):
    """An epoch that is read window by window.

    Attributes:
        chunk_rows: rows a chunk.
        chunks: int64 (c,), every chunk once, in the order of reading.
        chunk_views: int64 (c,), the view each is read from.
        ends: int64 (w,), of each window in `chunks`.
        row_ends: int64 (w,), of each window in `rows`.
    """

    chunk_rows: int
    chunks: NDArray[np.int64]
    chunk_views: NDArray[np.int64]
    ends: NDArray[np.int64]
    row_ends: NDArray[np.int64]

    def limited_batches(
        self, labels: NDArray[np.int64], size: int, classes: int
    ) -> list[Positions]:
        """Batches like `EpochOrder`'s, within each window; make the order with an enlarged one."""
        batches = []
        for start, end in zip([0, *self.row_ends[:-1]], self.row_ends, strict=True):
            window = limit_classes(labels[self.rows[start:end]], size, classes)
            batches += [start + positions for positions in window]
        return batches


def window_chunks(chunk_rows: int, rows: int | None = None) -> int:
    """Chunks a window: those of `rows` rows, by default of 4,096 but at most 64 chunks; and at
    least 16. Large rows fill the memory long before they are 4,096."""
    if rows is None:
        return min(window_chunks(chunk_rows, WINDOW_ROWS), MAX_WINDOW_CHUNKS)
    return max(WINDOW_CHUNKS, -(-rows // chunk_rows))


def row_order(*, seed: int, epoch: int, rows: int, views: int) -> EpochOrder:
    """The order for a store in RAM: rows permuted, each drawing its view.

    Each row meets every view once in `views` epochs.
    """
    order = np.random.default_rng([seed, epoch, 0]).permutation(rows)
    return EpochOrder(order, _draw_views(seed, epoch, rows, views)[order])


def window_order(
    *, seed: int, epoch: int, rows: int, views: int, chunk_rows: int, window: int
) -> WindowOrder:
    """The order for a store on disk: chunks permuted, the rows of each window mixed.

    Each chunk is read once an epoch and from every view once in `views` epochs. Every window
    has at least `window` whole chunks unless the store has fewer.

    Args:
        rows: the first rows of the store to use; the others are held out.
        window: chunks a window, at least; see `window_chunks`.
    """
    random = np.random.default_rng([seed, epoch, 0])
    whole = rows // chunk_rows
    deal = np.array_split(random.permutation(whole), max(1, whole // window))
    if rows % chunk_rows:
        # The store's last chunk, shorter than the others, makes no window smaller.
        place = random.integers(len(deal))
        deal[place] = np.append(deal[place], whole)
    views_of = _draw_views(seed, epoch, -(-rows // chunk_rows), views)
    mixed = []
    for chunks in deal:
        members = (chunks[:, None] * chunk_rows + np.arange(chunk_rows)).ravel()
        mixed.append(random.permutation(members[members < rows]))
    order, chunks = np.concatenate(mixed), np.concatenate(deal)
    return WindowOrder(
        rows=order,
        views=views_of[order // chunk_rows],
        chunk_rows=chunk_rows,
        chunks=chunks,
        chunk_views=views_of[chunks],
        ends=np.cumsum([len(window) for window in deal]),
        row_ends=np.cumsum([len(window) for window in mixed]),
    )


def limit_classes(labels: NDArray[np.int64], size: int, classes: int) -> list[Positions]:
    """Batches of few classes, without replacement, as in the published implementation.

    A batch begins with the next `classes` samples. If they cover fewer than `MIN_CLASSES`, the
    next `LOOKAHEAD` are searched for samples of new classes. Then it takes, from the front,
    every sample whose class it has, and where the list runs out whatever is left.

    Args:
        labels: of the shuffled samples, int64 (n,).

    Returns:
        Positions in `labels`, every one in exactly one batch; all but the last have `size`.
    """
    left = np.arange(len(labels))
    batches = []
    while len(left):
        # Nearly always the head of the list is enough, and the list is long.
        head = 16 * size + classes + LOOKAHEAD
        places = _alike(labels[left[:head]], size, classes)
        if len(places) < size and head < len(left):
            places = _alike(labels[left], size, classes)
        if len(places) < size:
            others = np.delete(np.arange(len(left)), places)
            places = np.append(places, others[: size - len(places)])
        batches.append(left[places])
        left = np.delete(left, places)
    return _join_single(batches)


def _alike(kinds: NDArray[np.int64], size: int, classes: int) -> Positions:
    """Places of the first batch of few classes in a list of classes, at most `size`."""
    taken = np.zeros(len(kinds), bool)
    taken[: min(classes, size)] = True
    covered = set(kinds[taken].tolist())
    for place, kind in enumerate(kinds[classes : classes + LOOKAHEAD].tolist(), classes):
        if len(covered) >= MIN_CLASSES or np.count_nonzero(taken) >= size:
            break
        if kind not in covered:
            covered.add(kind)
            taken[place] = True
    alike = np.flatnonzero(np.isin(kinds, list(covered)) & ~taken)
    taken[alike[: size - np.count_nonzero(taken)]] = True
    return np.flatnonzero(taken)


def _cut(positions: Positions, size: int) -> list[Positions]:
    return _join_single(np.split(positions, range(size, len(positions), size)))


def _join_single(batches: list[Positions]) -> list[Positions]:
    if len(batches) > 1 and len(batches[-1]) == 1:
        batches[-2:] = [np.concatenate(batches[-2:])]
    return batches


def _draw_views(seed: int, epoch: int, count: int, views: int) -> NDArray[np.int64]:
    """A view for each of `count` chunks or rows, balanced over `views` epochs."""
    cycle, step = divmod(epoch, views)
    permutations = np.tile(np.arange(views), (count, 1))
    return np.random.default_rng([seed, cycle, 1]).permuted(permutations, axis=1)[:, step]
