"""A data set: two splits whose rows are read by index."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from greedy.base.errors import UserError
from greedy.data.modes import Kind

Shape = tuple[int, int, int]
Rows = npt.NDArray[np.integer[Any]]
Images = npt.NDArray[Any]
Labels = npt.NDArray[np.int64]


class Split(Protocol):
    """Labelled images, read in any order."""

    @property
    def shape(self) -> Shape:
        """(C, H, W) of every image."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """uint8 for images of 0 to 255, or float32 for values used as they are."""

    @property
    def labels(self) -> Labels | None:
        """(n,) of all rows, where they are known without reading the rows."""

    def __len__(self) -> int: ...

    def read(self, indices: Rows) -> tuple[Images, Labels]:
        """Images (n, C, H, W) and labels (n,) of the rows (n,), in their order.

        Raises UserError for a row that cannot be read or does not have the split's shape.
        """


@dataclass(frozen=True)
class Dataset:
    """A training and a test split of one shape and dtype.

    ``class_names`` is None where the source does not know its classes; ``notes`` are sentences
    about what was left out, ``skipped`` the files that cannot be read and are, with reasons, and
    ``pixels`` the numbers of image files that hold more than bytes.
    Raises UserError if the splits do not agree or one is empty.
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


def spread(count: int, most: int) -> Rows:
    """Returns at most so many of ``count`` rows, as far apart as may be."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).astype(np.intp))


class ArraySplit:
    """Images (N, C, H, W) and labels (N,) held in memory."""

    def __init__(self, images: Images, labels: npt.ArrayLike) -> None:
        self._images, self.labels = images, np.asarray(labels, dtype=np.int64)
        channels, height, width = images.shape[1:]
        self.shape: Shape = (channels, height, width)
        self.dtype: np.dtype[Any] = images.dtype

    def __len__(self) -> int:
        return len(self._images)

    def read(self, indices: Rows) -> tuple[Images, Labels]:
        return np.ascontiguousarray(self._images[indices]), self.labels[indices]


class JoinedSplit:
    """Splits of one shape and dtype, one after the other, without a copy of either."""

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
            mine = owner == i
            start = self._ends[i] - len(part)
            images[mine], labels[mine] = part.read(indices[mine] - start)
        return images, labels
