"""Labels: integers from 0, and a remedy for each value that is none."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from greedy.base.errors import UserError
from greedy.base.text import SHOWN, first_names

NumbersAndRemedies = tuple[NDArray[np.int64], dict[int, str]]
MOST = 2**31  # more than the classes of any data set


def as_array(labels: Any) -> NDArray[Any] | None:
    """Returns a label, or all labels of a set, as an array; ``None`` where that is impossible."""
    if isinstance(labels, torch.Tensor):
        labels = labels.detach().cpu()
        labels = labels.double() if labels.is_floating_point() else labels
    try:
        return np.asarray(labels)
    except (TypeError, ValueError):  # rows of several lengths
        return None


def as_label(label: Any) -> int:
    """Returns a label as a class number: an integer from 0, or a truth value, alone or the only
    entry of a tensor or array. Raises ``ValueError`` with the remedy for anything else."""
    array = as_array(label)
    if array is None or array.dtype.kind not in "biufUS":
        raise ValueError("give each image the number of its class, and leave out those without one")
    if array.dtype.kind in "US":
        raise ValueError(
            "number the classes from 0 and name them in the data set's attribute `classes` (a "
            "data set of Hugging Face does both with class_encode_column)"
        )
    if array.size != 1:
        ones = array.size and np.count_nonzero(array) == np.count_nonzero(array == 1) == 1
        raise ValueError(
            "give the number of the class, here the position of the 1, as label.argmax() does"
            if ones
            else "an image has one class here: give its number"
        )
    value = array.item()
    if isinstance(value, float):
        raise ValueError(
            f"give the integer {int(value)}, as int(label) does"
            if value.is_integer() and value >= 0
            else "a label is the number of a class, an integer from 0, and not a measurement"
        )
    if value < 0:
        raise ValueError("number the classes from 0, and leave out images without a class")
    if value >= MOST:
        raise ValueError("number the classes from 0, one after the other")
    return int(value)


def label_or_remedy(label: Any) -> int | str:
    """Returns a label as a class number, or the remedy where it is none."""
    try:
        return as_label(label)
    except ValueError as error:
        return str(error)


def class_numbers(labels: Sequence[Any] | NDArray[Any]) -> NumbersAndRemedies:
    """Returns the labels (n,) as class numbers, -1 for invalid ones, and the remedy for each
    invalid one by its position."""
    array = labels if isinstance(labels, np.ndarray) else None
    if array is not None and array.ndim == 1 and array.dtype.kind in "bi" and array.min() >= 0:
        return array.astype(np.int64), {}
    values, remedies = np.full(len(labels), -1, np.int64), {}
    for i, label in enumerate(labels):
        number = label_or_remedy(label)
        if isinstance(number, str):
            remedies[i] = number
        else:
            values[i] = number
    return values, remedies


def wrong_labels(
    name: str, labels: Mapping[int, Any], remedy: str, looked_at: int | None = None
) -> UserError:
    """Returns the error about wrong ``labels`` of the split ``name``, by the indices of their
    samples, among ``looked_at`` labels, by default all."""
    shown = ", ".join(f"sample {row} has {_shown(labels[row])}" for row in sorted(labels)[:SHOWN])
    more = ", …" if len(labels) > SHOWN else ""
    count = "1 label" if len(labels) == 1 else f"{len(labels):,} labels"
    among = "" if looked_at is None else f" (among {looked_at:,} looked at)"
    verb = "is" if len(labels) == 1 else "are"
    return UserError(f"{count} of {name}{among} {verb} no class number: {shown}{more}; {remedy}")


def outside_remedy(values: NDArray[np.int64], classes: Sequence[int], names: Sequence[str]) -> str:
    """Returns the remedy for labels outside the classes' numbers ``classes``, given all labels
    ``values`` that were looked at; ``names`` are the classes' names."""
    first, last = min(classes), max(classes)
    if values.min() == first + 1 and values.max() == last + 1:
        return f"labels run from {first + 1} to {last + 1} and classes from {first}: subtract 1"
    whole = len(classes) == last - first + 1
    numbers = f"{first} to {last}" if whole else ", ".join(map(str, sorted(classes)))
    return (
        f"the classes are {numbers} ({first_names(names)}): use these numbers, or name every class"
    )


def require_classes(
    name: str, labels: Mapping[str, NDArray[np.int64] | None], class_names: list[str] | None
) -> None:
    """Raises ``UserError`` where the labels (n,) of the training and the test split, by the splits'
    names, are not those of at least two classes: a label without a class among ``class_names``, or,
    without names, numbers that leave open which classes there are. None stands for labels that are
    not known yet."""
    known = {split: values for split, values in labels.items() if values is not None}
    for split, values in known.items():
        count = len(class_names or ())
        wrong = np.flatnonzero((values < 0) | ((values >= count) if class_names else False))
        if len(wrong):
            remedy = (
                outside_remedy(values, range(count), class_names)
                if class_names
                else "number the classes from 0"
            )
            raise wrong_labels(f"{name} {split}", {int(i): values[i] for i in wrong}, remedy)
    train = known.get("train")
    if train is not None and train.min() == train.max():
        only = class_names[train[0]] if class_names else train[0]
        raise UserError(
            f"all {len(train):,} training images of {name} are of class {str(only)!r}: train on "
            f"images of two classes or more"
        )
    if class_names is None and len(known) == 2:
        _require_numbers(name, known["train"], known["test"])


def _require_numbers(name: str, train: NDArray[np.int64], test: NDArray[np.int64]) -> None:
    highest = int(train.max())
    if first := int(min(train.min(), test.min())):
        raise UserError(
            f"labels of {name} run from {first} to {max(highest, int(test.max()))}: number the "
            f"classes from 0, as label - {first} does, or name all of them in the training set's "
            f"attribute `classes`"
        )
    if highest >= len(train):
        raise UserError(
            f"a training label of {name} is {highest} and there are {len(train):,} training "
            f"images: number the classes one after the other, from 0"
        )
    if len(unseen := np.setdiff1d(test, train)):
        raise UserError(
            f"no training label of {name} is {first_names(unseen.tolist())}, and test labels are: "
            f"train on images of these classes, or name all classes in the training set's "
            f"attribute `classes`"
        )


def _shown(label: Any) -> str:
    array = as_array(label)
    if array is None or array.dtype.kind not in "biufUS":
        return f"a {type(label).__name__}" if label is not None else "None"
    return repr(array.item()) if array.size == 1 else f"{array.size} values"
