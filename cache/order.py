"""The order of one epoch: a pure function of seed, epoch and sizes.

A store in memory is permuted row by row. A store on disk is read by chunks: they are permuted and
divided into windows, and the rows of a window are mixed.
"""

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

WINDOW_CHUNKS = 16
WINDOW_ROWS = 4096
# A chunk has at most 4 MiB in float32, and two windows are in memory: 512 MiB at most.
MAX_WINDOW_CHUNKS = 64
LIMITED_WINDOW_ROWS = 8192
"""The least number of rows in a window where batches have limited classes."""

CHUNKS_A_READER = 4
"""The least number of a window's chunks for each of several readers."""

# With limited classes: a batch covers at least MIN_CLASSES, searched for among LOOKAHEAD samples.
MIN_CLASSES = 10
LOOKAHEAD = 200

Positions = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class EpochOrder:
    """The row and the view at each of the n positions of an epoch.

    Attributes:
        rows: int64 (n,), every row once.
        views: int64 (n,), the view that each row is read from.
    """

    rows: NDArray[np.int64]
    views: NDArray[np.int64]

    def batches(self, size: int) -> list[Positions]:
        """Returns the positions of each batch; a last batch of one row joins the one before."""
        return _cut(np.arange(len(self.rows)), size)

    def limited_batches(
        self, labels: NDArray[np.int64], size: int, classes: int
    ) -> list[Positions]:
        """Returns the positions of each batch as ``limit_classes`` makes them. ``labels`` (rows,)
        are those of the store's rows."""
        return limit_classes(labels[self.rows], size, classes)

    def shares(self, batch: Positions, readers: int) -> list[Positions]:
        """Divides a batch over ``readers``: returns the places in it (n,) of each one's rows, which
        are nearly equally many, and perhaps none in a small batch."""
        return np.array_split(np.arange(len(batch)), readers)


@dataclass(frozen=True, eq=False)
class WindowOrder(EpochOrder):
    """An epoch that is read window by window.

    Attributes:
        chunk_rows: rows in a chunk.
        chunks: int64 (c,), every chunk once, in the order of reading.
        chunk_views: int64 (c,), the view that each chunk is read from.
        ends: int64 (w,), the end of each window in ``chunks``.
        row_ends: int64 (w,), the end of each window in ``rows``.
    """

    chunk_rows: int
    chunks: NDArray[np.int64]
    chunk_views: NDArray[np.int64]
    ends: NDArray[np.int64]
    row_ends: NDArray[np.int64]

    def limited_batches(
        self, labels: NDArray[np.int64], size: int, classes: int
    ) -> list[Positions]:
        """Returns batches as ``EpochOrder`` does, but each within a window, which should have
        ``LIMITED_WINDOW_ROWS`` rows."""
        batches = []
        for start, end in zip([0, *self.row_ends[:-1]], self.row_ends, strict=True):
            window = limit_classes(labels[self.rows[start:end]], size, classes)
            batches += [start + positions for positions in window]
        return batches

    def shares(self, batch: Positions, readers: int) -> list[Positions]:
        """Divides a batch as ``EpochOrder`` does, but so that each chunk has one reader, where
        windows have chunks enough for shares of similar size."""
        if np.diff(self.ends, prepend=0).min() < CHUNKS_A_READER * readers:
            return super().shares(batch, readers)
        reader = self._readers[self.rows[batch] // self.chunk_rows] % readers
        places = [np.flatnonzero(reader == number) for number in range(readers)]
        return _levelled(places, largest_share(len(batch), readers))

    @cached_property
    def _readers(self) -> NDArray[np.int64]:
        """The place in reading order of each chunk."""
        return np.argsort(self.chunks)


def largest_share(rows: int, readers: int) -> int:
    """Returns the most rows of a batch of ``rows`` that one of several readers gets: the mean, and
    four standard deviations of chunks that go to any of them, so that chance hardly gives more."""
    mean = rows / readers
    return min(rows, math.ceil(mean + 4 * math.sqrt(mean * (1 - 1 / readers))))


def _levelled(places: list[Positions], most: int) -> list[Positions]:
    """Moves the last places of readers that have more than ``most`` to those with fewest."""
    while len(longest := max(places, key=len)) > most:
        shortest = min(places, key=len)
        spare = min(len(longest) - most, most - len(shortest))
        moved = {id(longest): longest[:-spare]}
        moved[id(shortest)] = np.sort(np.append(shortest, longest[-spare:]))
        places = [moved.get(id(place), place) for place in places]
    return places


def window_chunks(chunk_rows: int, rows: int | None = None) -> int:
    """Returns the number of chunks in a window: as many as hold ``rows`` rows, but at least 16.
    The default is 4,096 rows, but at most 64 chunks, since 4,096 large rows would fill the
    memory."""
    if rows is None:
        return min(window_chunks(chunk_rows, WINDOW_ROWS), MAX_WINDOW_CHUNKS)
    return max(WINDOW_CHUNKS, -(-rows // chunk_rows))


def row_order(*, seed: int, epoch: int, rows: int, views: int) -> EpochOrder:
    """Returns the order for a store in memory: rows permuted, a view drawn for each.

    Each row is read from every view once in ``views`` epochs.
    """
    order = np.random.default_rng([seed, epoch, 0]).permutation(rows)
    return EpochOrder(order, _draw_views(seed, epoch, rows, views)[order])


def window_order(
    *, seed: int, epoch: int, rows: int, views: int, chunk_rows: int, window: int
) -> WindowOrder:
    """Returns the order for a store on disk: chunks permuted, the rows of each window mixed.

    Each chunk is read once in an epoch, and from every view once in ``views`` epochs. Every window
    has at least ``window`` whole chunks unless the store has fewer.

    Args:
        rows: how many of the store's first rows to use; the others are held out.
        window: the least number of chunks in a window; see ``window_chunks``.
    """
    random = np.random.default_rng([seed, epoch, 0])
    whole = rows // chunk_rows
    windows = np.array_split(random.permutation(whole), max(1, whole // window))
    if rows % chunk_rows:
        # The last chunk, shorter than the others, joins a window that is long enough without it.
        chosen = random.integers(len(windows))
        windows[chosen] = np.append(windows[chosen], whole)
    chunk_views = _draw_views(seed, epoch, -(-rows // chunk_rows), views)
    mixed = []
    for chunks in windows:
        members = (chunks[:, None] * chunk_rows + np.arange(chunk_rows)).ravel()
        mixed.append(random.permutation(members[members < rows]))
    order, chunks = np.concatenate(mixed), np.concatenate(windows)
    return WindowOrder(
        rows=order,
        views=chunk_views[order // chunk_rows],
        chunk_rows=chunk_rows,
        chunks=chunks,
        chunk_views=chunk_views[chunks],
        ends=np.cumsum([len(window) for window in windows]),
        row_ends=np.cumsum([len(window) for window in mixed]),
    )


def limit_classes(labels: NDArray[np.int64], size: int, classes: int) -> list[Positions]:
    """Makes batches of few classes, without replacement, as the published implementation does.

    A batch begins with the next ``classes`` samples. If they cover fewer than ``MIN_CLASSES``, the
    next ``LOOKAHEAD`` are searched for samples of new classes. Then it is filled with the first
    samples of the classes it has, and where these run out with the first of all others.

    Args:
        labels: int64 (n,), the classes of the shuffled samples.
        size: samples in a batch.
        classes: number of samples that choose the classes.

    Returns:
        Positions in ``labels``, each in exactly one batch; all batches but the last have ``size``.
    """
    remaining = np.arange(len(labels))
    batches = []
    while len(remaining):
        # Nearly always the head of the list is enough, and the list is long.
        head = 16 * size + classes + LOOKAHEAD
        chosen = _few_classes(labels[remaining[:head]], size, classes)
        if len(chosen) < size and head < len(remaining):
            chosen = _few_classes(labels[remaining], size, classes)
        if len(chosen) < size:
            others = np.delete(np.arange(len(remaining)), chosen)
            chosen = np.append(chosen, others[: size - len(chosen)])
        batches.append(remaining[chosen])
        remaining = np.delete(remaining, chosen)
    return _join_single(batches)


def _few_classes(labels: NDArray[np.int64], size: int, classes: int) -> Positions:
    """Returns the positions of the first batch in a list of classes, at most ``size``."""
    taken = np.zeros(len(labels), bool)
    taken[: min(classes, size)] = True
    covered = set(labels[taken].tolist())
    for position, label in enumerate(labels[classes : classes + LOOKAHEAD].tolist(), classes):
        if len(covered) >= MIN_CLASSES or np.count_nonzero(taken) >= size:
            break
        if label not in covered:
            covered.add(label)
            taken[position] = True
    same_class = np.flatnonzero(np.isin(labels, list(covered)) & ~taken)
    taken[same_class[: size - np.count_nonzero(taken)]] = True
    return np.flatnonzero(taken)


def _cut(positions: Positions, size: int) -> list[Positions]:
    return _join_single(np.split(positions, range(size, len(positions), size)))


def _join_single(batches: list[Positions]) -> list[Positions]:
    if len(batches) > 1 and len(batches[-1]) == 1:
        batches[-2:] = [np.concatenate(batches[-2:])]
    return batches


def _draw_views(seed: int, epoch: int, count: int, views: int) -> NDArray[np.int64]:
    """Draws a view for each of ``count`` chunks or rows, balanced over ``views`` epochs."""
    cycle, step = divmod(epoch, views)
    permutations = np.tile(np.arange(views), (count, 1))
    return np.random.default_rng([seed, cycle, 1]).permuted(permutations, axis=1)[:, step]
