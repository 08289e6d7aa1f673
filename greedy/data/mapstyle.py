"""Map-style data sets: objects with a length and ``[index]`` that returns an image and its
label."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from copy import copy
from dataclasses import replace
from functools import cached_property
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, IterableDataset

from greedy.base.errors import UserError
from greedy.base.functions import call_function, user_errors_explained
from greedy.base.seeds import generators_restored
from greedy.base.text import first_names
from greedy.data.arrays import as_image
from greedy.data.classes import ClassInfo, ClassLookup, class_info, match_classes
from greedy.data.labels import class_numbers, label_or_remedy, require_classes, wrong_labels
from greedy.data.modes import WHITE
from greedy.data.randomness import (
    Generator,
    generator_states,
    own_generators,
    seed_generators,
    transform_names,
)
from greedy.data.samples import image_and_label
from greedy.data.splits import Dataset, Images, Labels, Rows, Shape, spread_rows

PYTHON = "python"  # the name of sets given in Python
LOOKED_AT = 16  # samples that are read to check a set
READINGS = 4  # of each: enough to notice random flips
MORE_READINGS = 16  # of each if it draws numbers: one flip in a hundred is nearly always found


def dataset_from_torch(
    train_set: Any, test_set: Any, name: str = PYTHON, background: str = WHITE
) -> Dataset:
    """Returns the data set of two map-style sets, torch's, torchvision's, Hugging Face's or others.

    A sample is a pair (image, label), or a dictionary, named tuple or object with ``image``,
    ``img`` or ``pixel_values`` and ``label``, ``labels`` or ``fine_label``. An image is

    - a PIL image of any mode, which becomes grey or RGB with its transparent parts over the colour
      ``background``; those of the modes I, I;16 and F become float32 with the same values;
    - a tensor (C, H, W), or an array, (H, W, C) where only its last axis has the length 1, 3 or 4
      and (C, H, W) where only its first has;
    - a tensor or array (H, W), or a vector of floats (F,), which becomes (F, 1, 1), so that
      features are normalised one by one.

    uint8 and bool are images of 0 to 255; floats, int16 and uint16 become float32 and are
    otherwise used as they are. Labels are integers from 0. Classes have the names that the sets
    give them (``classes``, ``class_to_idx``, ``features``), also through ``Subset``,
    ``ConcatDataset`` and a wrapper's ``dataset``; where both sets have names, classes are the same
    if their names are. ``Dataset.class_names`` is None where neither has.

    Raises UserError for anything else, here or when the sample is read.
    """
    names = f"{name} train", f"{name} test"
    sets = dict(zip(names, (train_set, test_set), strict=True))
    for split, samples in sets.items():
        _require_map_style(samples, split)
    with generators_restored():
        train, test = (_checked_class_info(samples, split) for split, samples in sets.items())
    class_names, *lookups = match_classes(train, test, names)
    train_split, test_split = (
        MapSplit(samples, split, lookup, info.labels, background)
        for samples, split, info, lookup in zip(
            sets.values(), names, (train, test), lookups, strict=True
        )
    )
    require_classes(name, {"train": train_split.labels, "test": test_split.labels}, class_names)
    return Dataset(name, train_split, test_split, class_names)


def load_function(name: str, background: str = WHITE) -> Dataset:
    """Returns the data set of the two map-style sets that ``module:function`` returns without
    arguments.

    The current directory is importable. Raises ``UserError`` where there is no such function, or it
    does not return a pair.
    """
    sets = call_function(name)
    if isinstance(sets, Mapping):
        raise UserError(
            f"{name} returns a dictionary of {_listed(sets)}: return two of these sets, (train, "
            f"test)"
        )
    if not (isinstance(sets, tuple) and len(sets) == 2):
        raise UserError(f"{name} must return two map-style data sets, (train, test)")
    return dataset_from_torch(*sets, name=name, background=background)


def draws_at_random(dataset: Dataset) -> bool:
    """Returns whether the training samples of a map-style set differ each time they are read.

    Raises ``UserError`` if test samples do, or if training samples still do after the generators
    are seeded.
    """
    train, test = dataset.train, dataset.test
    if isinstance(test, MapSplit) and (row := test.changing_row()) is not None:
        raise UserError(
            f"sample {row} of {test.name} changes each time it is read, and test samples are read "
            f"once: give a test set that draws nothing at random {test.place_of_draws}"
        )
    if not isinstance(train, MapSplit) or train.changing_row() is None:
        return False
    if (row := train.seeded(0).changing_row()) is not None:
        raise UserError(
            f"sample {row} of {train.name} changes each time it is read although the generators "
            f"are seeded: let what is drawn {train.place_of_draws} come from the global generators "
            f"of torch, NumPy or random, or from one that is an attribute of the set or transform"
        )
    return True


def first_pass(dataset: Dataset, seed: int) -> Dataset:
    """Returns a map-style data set whose samples are drawn as in view 0, which stage 0 stores, so
    that what nobody noticed to be random is the same each time, too; any other data set
    unchanged."""
    train, test = (
        split.view(seed, 0) if isinstance(split, MapSplit) else split
        for split in (dataset.train, dataset.test)
    )
    return replace(dataset, train=train, test=test)


class MapSplit:
    """A map-style data set as a split; its shape and dtype are those of its first sample.

    Attributes:
        name: of the split, for errors.
        labels: the class numbers (n,) of all samples, None where they are not known beforehand.
    """

    _pass: tuple[int, tuple[int | str, ...]] | None = None

    def __init__(
        self,
        samples: Any,
        name: str,
        lookup: ClassLookup,
        labels: NDArray[Any] | None,
        background: str = WHITE,
    ) -> None:
        self._samples, self.name, self._lookup = samples, name, lookup
        self._background = background
        self.labels = None if labels is None else self._classes(np.arange(len(samples)), labels)
        image, label = self._sample(0)
        self._classes(np.array([0]), [label])
        self.shape: Shape = image.shape
        self.dtype: np.dtype[Any] = image.dtype

    def __len__(self) -> int:
        return len(self._samples)

    def seeded(self, seed: int, *key: int | str) -> Self:
        """Returns the split as one pass draws it: what a sample draws at random follows from
        ``seed``, ``key`` and its number, whatever was read before it, and in which process."""
        split = copy(self)
        split._pass, split._own = (seed, key), self._own  # found once for all passes
        return split

    @cached_property
    def _own(self) -> Sequence[Generator]:
        return own_generators(self._samples)

    def view(self, seed: int, number: int) -> Self:
        """Returns the split as view ``number`` draws it, in a run with this seed."""
        return self.seeded(seed, "view", number)

    def read(self, indices: Rows) -> tuple[Images, Labels]:
        with self._drawing() if self._pass else nullcontext():
            return self._read(indices)

    def _read(self, indices: Rows) -> tuple[Images, Labels]:
        images = np.empty((len(indices), *self.shape), self.dtype)
        labels = []
        for i, index in enumerate(indices):
            image, label = self._sample(int(index))
            if (image.shape, image.dtype) != (self.shape, self.dtype):
                raise UserError(
                    f"sample {index} of {self.name} is {image.dtype} of shape {image.shape}, "
                    f"sample 0 {self.dtype} of shape {self.shape}: make them alike"
                )
            images[i] = image
            labels.append(label)
        self._require_finite(indices, images)
        return images, self._classes(indices, labels)

    def changing_row(self) -> int | None:
        """Returns a sample, of a few of all classes, that differs when it is read again; None where
        none does. Passes are seeded, so that the answer is the same each time."""
        everywhere = spread_rows(len(self), LOOKED_AT).tolist()
        rows = everywhere if self.labels is None else _rows_of_all_kinds(self.labels)
        numbers = range(MORE_READINGS)
        passes = [self if self._pass else self.seeded(0, "look", number) for number in numbers]
        with self._drawing():
            firsts = [(passes[0]._content(row), passes[0]._drew(row)) for row in rows]
            more = self._pass is None and any(drew for _, drew in firsts)
            count = MORE_READINGS if more else READINGS
            for row, (first, _) in zip(rows, firsts, strict=True):
                if any(each._content(row) != first for each in passes[1:count]):
                    return row
        return None

    def _drew(self, row: int) -> bool:
        """Returns whether a generator is no longer as it was before sample ``row`` was read."""
        after = generator_states(self._own)
        self._seed(row)
        return generator_states(self._own) != after

    @property
    def place_of_draws(self) -> str:
        """Where the samples may be drawn at random, in words."""
        transforms = transform_names(self._samples)
        return f"among its transforms ({', '.join(transforms)})" if transforms else "in its [index]"

    @contextmanager
    def _drawing(self) -> Iterator[None]:
        """Restores the global generators after the block. Samples of a pass are read by one thread,
        as a ``DataLoader`` worker reads them, since sums over threads differ in the last digit."""
        threads = torch.get_num_threads()
        with generators_restored():
            try:
                if self._pass:
                    torch.set_num_threads(1)
                yield
            finally:
                torch.set_num_threads(threads)

    def _content(self, row: int) -> tuple[Any, ...]:
        image, label = self._sample(row)
        return image.shape, image.dtype, image.tobytes(), label_or_remedy(label)

    def _seed(self, row: int) -> None:
        if self._pass:
            seed, key = self._pass
            seed_generators(self._own, seed, *key, row)

    def _sample(self, index: int) -> tuple[NDArray[Any], Any]:
        self._seed(index)
        image, label = _read(self._samples, index, self.name)
        with user_errors_explained(f"the image of sample {index} of {self.name} cannot be read"):
            try:
                return as_image(image, self._background), label
            except ValueError as error:
                raise UserError(f"the image of sample {index} of {self.name} {error}") from error

    def _classes(self, rows: Rows, labels: Sequence[Any] | NDArray[Any]) -> Labels:
        """Returns the class numbers (n,) of the samples ``rows`` (n,) from their labels."""
        values, remedies = class_numbers(labels)
        classes = self._lookup.numbers(rows, values)
        if len(wrong := np.flatnonzero(classes < 0)):
            kinds = [remedies[i] for i in wrong.tolist() if i in remedies]
            remedy = kinds[0] if kinds else self._lookup.remedy(values)
            invalid = {int(rows[i]): labels[i] for i in wrong.tolist()}
            raise wrong_labels(
                self.name, invalid, remedy, None if len(rows) == len(self) else len(rows)
            )
        return classes

    def _require_finite(self, rows: Rows, images: Images) -> None:
        if images.dtype == np.uint8 or np.isfinite(images).all():
            return
        bad = [
            int(row)
            for row, image in zip(rows, images, strict=True)
            if not np.isfinite(image).all()
        ]
        raise UserError(
            f"values of {self.name} are not finite (NaN, infinite or beyond float32) in "
            f"{len(bad):,} of {len(rows):,} samples looked at ({first_names(sorted(bad))}): "
            f"replace these values, or leave the samples out"
        )


def _require_map_style(samples: Any, name: str) -> None:
    problem = None
    if isinstance(samples, DataLoader):
        problem = "is a DataLoader: give the data set it loads from"
    elif isinstance(samples, type):
        problem = f"is the class {samples.__name__}: give a data set made of it"
    elif isinstance(samples, str):
        problem = "is a text: give a data set, such as torchvision's ImageFolder makes of a folder"
    elif isinstance(samples, Mapping):
        problem = f"is a dictionary of {_listed(samples)}: give one of its data sets"
    elif isinstance(samples, torch.Tensor | np.ndarray) or (
        isinstance(samples, tuple)
        and all(isinstance(e, torch.Tensor | np.ndarray) for e in samples)
        and len(samples) == 2
    ):
        problem = "is an array or two: give torch's TensorDataset(images, labels)"
    elif isinstance(samples, IterableDataset) or not hasattr(samples, "__getitem__"):
        problem = (
            f"is no map-style data set but {_a(type(samples).__name__)}: give one with a length "
            f"and [index], as list(...) makes of samples that fit into memory"
        )
    elif not hasattr(samples, "__len__"):
        problem = "is no map-style data set, since it has no length: give it a __len__"
    else:
        with user_errors_explained(f"the length of {name} cannot be read"):
            problem = None if len(samples) else "is empty: give it samples"
    if problem:
        raise UserError(f"{name} {problem}")


def _checked_class_info(samples: Any, name: str) -> ClassInfo:
    """Returns a set's class information, without its labels where reading samples gives others: a
    transform changes labels, and the class names do not apply to them."""
    with user_errors_explained(f"classes and labels of {name} cannot be read"):
        info = class_info(samples, name)
    if info.labels is None:
        return info
    rows = _rows_of_all_kinds(info.labels)
    read = [label_or_remedy(_read(samples, row, name)[1]) for row in rows]
    stored = [label_or_remedy(info.labels[row]) for row in rows]
    if read == stored:
        return info
    named = all(
        (info.tables[info.owner[row]] or {}).get(label) is not None
        for row, label in zip(rows, stored, strict=True)
    )
    return replace(info, labels=None, renumbered=info.renumbered or named)


def _rows_of_all_kinds(labels: NDArray[Any]) -> list[int]:
    """Returns a few rows, some spread over the set and some with as many different labels as
    possible."""
    rows = spread_rows(len(labels), LOOKED_AT)
    if labels.ndim == 1 and labels.dtype.kind != "O":
        _, first = np.unique(labels, return_index=True)
        rows = np.union1d(rows, first[spread_rows(len(first), LOOKED_AT)])
    return rows.tolist()


def _read(samples: Any, index: int, name: str) -> tuple[Any, Any]:
    with user_errors_explained(f"sample {index} of {name} cannot be read"):
        sample = samples[index]
    try:
        return image_and_label(sample)
    except ValueError as error:
        raise UserError(f"sample {index} of {name} {error}") from error


def _listed(keys: Mapping[Any, Any]) -> str:
    return first_names([repr(key) for key in keys])


def _a(noun: str) -> str:
    return f"{'an' if noun[0] in 'AEIOUaeiou' else 'a'} {noun}"
