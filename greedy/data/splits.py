"""A data set: two splits whose rows are read by index."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from greedy.base.errors import UserError
from greedy.data.modes import Kind

Shape = tuple[int, int, int]
Rows = NDArray[np.integer[Any]]
Images = NDArray[Any]
Labels = NDArray[np.int64]


class Split(Protocol):
    """Labelled images, readable in any order."""

    @property
    def shape(self) -> Shape:
        """(C, H, W) of every image."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """uint8 for images of 0 to 255, or float32 for values that are used unscaled."""

    @property
    def labels(self) -> Labels | None:
        """(n,) of all rows; None where they are known only by reading the rows."""

    def __len__(self) -> int: ...

    def read(self, indices: Rows) -> tuple[Images, Labels]:
        """Returns images (n, C, H, W) and labels (n,) of the rows (n,), in their order.

        Raises ``UserError`` for a row that cannot be read or does not have the split's shape.
        """


@dataclass(frozen=True)
class Dataset:
    """A training and a test split of one shape and dtype.

    Attributes:
        class_names: None where the source has none.
        notes: sentences about what is left out.
        skipped: files left out because they cannot be read, with reasons.
        pixels: the kind of numbers of image files with more than 8 bits, else None.

    Raises ``UserError`` if the splits do not agree or one is empty.
    """

    name: str
    train: Split
    test: Split
    class_names: list[str] | None
    notes: Sequence[str] = ()
    skipped: Mapping[str, str] = field(default_factory=dict)
    pixels: Kind | None = None

    def __post_init__(self) -> None:
        for kind, split in (("training", self.train), ("test", self.test)):
            if not len(split):
                raise UserError(f"the {kind} split of {self.name!r} is empty: give it images")
        train, test = ((split.shape, split.dtype.name) for split in (self.train, self.test))
        if train != test:
            raise UserError(
                f"training images of {self.name!r} are {train[1]} of shape {train[0]}, "
                f"test images {test[1]} of shape {test[0]}: make them alike"
            )


def spread_rows(count: int, most: int) -> Rows:
    """Returns at most ``most`` of ``count`` rows, evenly spaced."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).astype(np.intp))


class ArraySplit:
    """Images (N, C, H, W) and labels (N,) held in memory."""

    def __init__(self, images: Images, labels: ArrayLike) -> None:
        self._images, self.labels = images, np.asarray(labels, dtype=np.int64)
        channels, height, width = images.shape[1:]
        self.shape: Shape = (channels, height, width)
        self.dtype: np.dtype[Any] = images.dtype

    def __len__(self) -> int:
        return len(self._images)

    def read(self, indices: Rows) -> tuple[Images, Labels]:
        return np.ascontiguousarray(self._images[indices]), self.labels[indices]


class JoinedSplit:
    """Splits of one shape and dtype in sequence, without copying them."""

    def __init__(self, *parts: Split) -> None:
        self._parts = parts
        self._ends = np.cumsum([len(part) for part in parts])
        self.shape, self.dtype = parts[0].shape, parts[0].dtype
        known = [part.labels for part in parts if part.labels is not None]
        self.labels = np.concatenate(known) if len(known) == len(parts) else None

    def __len__(self) -> int:
        return int(self._ends[-1])

    def read(self, indices: Rows) -> tuple[Images, Labels]:
        images = np.empty((len(indices), *self.shape), self.dtype)
        labels = np.empty(len(indices), np.int64)
        owner = np.searchsorted(self._ends, indices, side="right")
        for i, part in enumerate(self._parts):
            in_part = owner == i
            start = self._ends[i] - len(part)
            images[in_part], labels[in_part] = part.read(indices[in_part] - start)
        return images, labels
