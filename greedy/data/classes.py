"""The class names and labels that a map-style data set, or the sets inside it, declare without
reading samples."""

import os
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import ConcatDataset, Dataset, Subset

from greedy.base.errors import UserError
from greedy.data.labels import as_array, outside_remedy
from greedy.data.samples import LABEL_KEYS

Table = dict[int, str]  # from labels to class names
Positions = NDArray[np.integer[Any]]


@dataclass(frozen=True)
class ClassInfo:
    """The class names and labels that a set of n samples declares.

    Attributes:
        tables: one for each part of the set with another numbering of classes; None for a part
            without names.
        owner: (n,) the index of each sample's table.
        labels: (n, ...) of the samples, None where the set does not keep them apart from the
            images.
        renumbered: whether samples have, or may have, other labels than those the names are for.
    """

    tables: list[Table | None]
    owner: Positions
    labels: NDArray[Any] | None
    renumbered: bool = False


@dataclass(frozen=True)
class ClassLookup:
    """Translates a set's labels to class numbers; without tables it keeps them.

    Attributes:
        tables: from labels to numbers, for parts of the set.
        owner: (n,) the index of each sample's table.
        class_names: by number.
    """

    tables: list[dict[int, int]] | None
    owner: Positions
    class_names: list[str]

    def numbers(self, rows: Positions, labels: NDArray[np.int64]) -> NDArray[np.int64]:
        """Returns the class numbers (n,) of the samples ``rows`` (n,) from their labels (n,); -1
        where there is no class."""
        if self.tables is None:
            return labels
        pairs = zip(self.owner[rows].tolist(), labels.tolist(), strict=True)
        return np.array([self.tables[part].get(label, -1) for part, label in pairs], np.int64)

    def remedy(self, labels: NDArray[np.int64]) -> str:
        """Returns what to do about labels (n,) some of which have no class."""
        labels_of_classes = {label for table in self.tables or () for label in table}
        return outside_remedy(labels, sorted(labels_of_classes), self.class_names)


def class_info(samples: Any, name: str) -> ClassInfo:
    """Returns the class names and labels that a set declares. Names come from its attributes
    ``class_to_idx`` or ``classes`` or its Hugging Face features, else from the sets inside it.

    Raises ``UserError`` for names that are none, or that leave open which sample they are for.
    """
    count = len(samples)
    table, labels = _own_table(samples, name), _own_labels(samples)
    if table is not None:
        return ClassInfo([table], np.zeros(count, np.intp), labels)
    info = _info_from_parts(samples, name)
    if info is None:
        return ClassInfo([None], np.zeros(count, np.intp), labels)
    if labels is None:
        return info
    other = info.labels is not None and not np.array_equal(info.labels, labels)
    return replace(info, labels=labels, renumbered=info.renumbered or other)


def match_classes(
    train: ClassInfo, test: ClassInfo, names: tuple[str, str]
) -> tuple[list[str] | None, ClassLookup, ClassLookup]:
    """Returns the classes' names, None where neither set has any, and each set's translation of
    labels to class numbers: by name where both sets have names, else by the one numbering there is.
    Labels that are, or may be, renumbered keep their numbers and have no names.

    Raises ``UserError`` where a test set names a class that the training set does not, or parts of
    a set number their classes differently and another has no names.
    """
    tables = [table for table in (*train.tables, *test.tables) if table is not None]
    differ = any(table != tables[0] for table in tables)
    if not tables or train.renumbered or test.renumbered:
        if differ:
            raise UserError(
                f"{names[0]} and {names[1]}, or parts of them, number their classes differently, "
                f"and labels of samples are changed, or may be, after they are named: give both "
                f"an attribute `classes` with the names of their labels, or leave out what changes "
                f"labels"
            )
        return None, ClassLookup(None, train.owner, []), ClassLookup(None, test.owner, [])
    for info, name in zip((train, test), names, strict=True):
        if None in info.tables and differ:
            raise UserError(
                f"{name}, or a part of it, names no classes, and the others number theirs "
                f"differently: give it an attribute `classes` with their names"
            )
    first = [table for table in train.tables if table is not None] or tables
    class_names = list(dict.fromkeys(name for table in first for name in table.values()))
    unknown = sorted({name for table in tables for name in table.values()} - set(class_names))
    if unknown:
        raise UserError(
            f"{names[1]} has classes that {names[0]} lacks: {', '.join(map(repr, unknown))}; "
            f"train on them, or leave them out"
        )
    number_of = {name: number for number, name in enumerate(class_names)}

    def lookup(info: ClassInfo) -> ClassLookup:
        named = [tables[0] if table is None else table for table in info.tables]
        numbers = [{label: number_of[n] for label, n in table.items()} for table in named]
        return ClassLookup(numbers, info.owner, class_names)

    return class_names, lookup(train), lookup(test)


def label_column(samples: Any) -> str | None:
    """Returns the name of a Hugging Face data set's label column, None where there is not exactly
    one."""
    features = getattr(samples, "features", None)
    keys = [key for key in LABEL_KEYS if isinstance(features, Mapping) and key in features]
    return keys[0] if len(keys) == 1 else None


def inner_set(samples: Any) -> Any | None:
    """Returns the set that a wrapper holds as ``dataset``, or under another name if it is the only
    set in it and has the same length."""
    inner = getattr(samples, "dataset", None)
    is_set = hasattr(inner, "__len__") and hasattr(inner, "__getitem__")
    if is_set and not isinstance(inner, str | Mapping):
        return inner
    values = getattr(samples, "__dict__", {}).values() if isinstance(samples, Dataset) else ()
    sets = [x for x in values if isinstance(x, Dataset) or hasattr(x, "features")]
    sets = [x for x in sets if hasattr(x, "__len__")]
    return sets[0] if len(sets) == 1 and len(sets[0]) == len(samples) else None


def _info_from_parts(samples: Any, name: str) -> ClassInfo | None:
    if isinstance(samples, ConcatDataset):
        return _joined_info([class_info(part, name) for part in samples.datasets])
    inner = inner_set(samples)
    if inner is None:
        return None
    info = class_info(inner, name)
    if isinstance(samples, Subset):
        rows = np.asarray(samples.indices, np.intp)
        used, owner = np.unique(info.owner[rows], return_inverse=True)
        labels = None if info.labels is None else info.labels[rows]
        return ClassInfo([info.tables[i] for i in used], owner, labels, info.renumbered)
    if info.labels is not None and len(info.labels) == len(samples):
        return info  # callers check that reading samples gives these labels
    return ClassInfo(info.tables, np.zeros(len(samples), np.intp), None, renumbered=True)


def _joined_info(parts: list[ClassInfo]) -> ClassInfo:
    tables: list[Table | None] = []
    owners = []
    for part in parts:
        tables += [table for table in part.tables if table not in tables]
        owners.append(np.array([tables.index(table) for table in part.tables])[part.owner])
    kept = [part.labels for part in parts if part.labels is not None]
    alike = len(kept) == len(parts) and len({(a.dtype.kind, a.shape[1:]) for a in kept}) == 1
    labels = np.concatenate(kept) if alike else None
    return ClassInfo(tables, np.concatenate(owners), labels, any(part.renumbered for part in parts))


def _own_table(samples: Any, name: str) -> Table | None:
    numbers = getattr(samples, "class_to_idx", None)
    names = getattr(samples, "classes", None)
    if names is None:
        column = label_column(samples)
        names = getattr(samples.features[column], "names", None) if column else None
    # A set has no order, and an iterator is empty the second time.
    ordered = hasattr(names, "__iter__") and hasattr(names, "__len__")
    if names is not None and (not ordered or isinstance(names, str | Mapping | set | frozenset)):
        raise UserError(
            f"{name} has an attribute `classes` that is no list of names: name the classes in it, "
            f"in the order of their labels"
        )
    listed = [] if names is None else [_text(entry) for entry in names]
    if isinstance(numbers, Mapping) and (not listed or set(listed) == set(map(_text, numbers))):
        pairs = _numbered(numbers, name)
    else:
        pairs = list(enumerate(listed))
    return _table(pairs, name) if pairs else None


def _numbered(numbers: Mapping[Any, Any], name: str) -> list[tuple[int, str]]:
    try:
        return sorted((int(number), _text(key)) for key, number in numbers.items())
    except (TypeError, ValueError) as error:
        raise UserError(
            f"{name} has an attribute `class_to_idx` that does not lead from names to numbers: "
            f"give it the label of each class, by its name"
        ) from error


def _table(pairs: list[tuple[int, str]], name: str) -> Table:
    """Returns the table of pairs of label and name. Names are in one Unicode normalisation, so that
    those that look equal are one class."""
    label_of: dict[str, int] = {}
    for label, text in pairs:
        if label_of.setdefault(text, label) != label:
            raise UserError(
                f"{name} calls both class {label_of[text]} and class {label} {text!r}: give each "
                f"class another name"
            )
    table: Table = {}
    for label, text in pairs:
        shown = unicodedata.normalize("NFC", text)
        table[label] = f"{table[label]}, {shown}" if label in table else shown
    return table


def _text(name: Any) -> str:
    """Returns a class's name as text; it may be a tuple of names, as in ImageNet."""
    if isinstance(name, tuple | list):
        return ", ".join(map(_text, name))
    return os.fsdecode(name) if isinstance(name, bytes) else str(name)


def _own_labels(samples: Any) -> NDArray[Any] | None:
    """Returns the labels that a set keeps apart from its images, in the order of its samples."""
    if column := label_column(samples):
        return as_array(samples.select_columns([column]).with_format("numpy")[:][column])
    kept = (getattr(samples, attribute, None) for attribute in ("targets", "labels"))
    tensors, files = getattr(samples, "tensors", ()), getattr(samples, "samples", None)
    files = files if isinstance(files, list) else []
    pairs = all(isinstance(file, tuple) and len(file) == 2 for file in files)
    candidates = [
        *kept,
        tensors[1] if isinstance(tensors, tuple) and len(tensors) == 2 else None,
        [label for _, label in files] if pairs else [],
    ]
    for candidate in candidates:
        if isinstance(candidate, torch.Tensor | np.ndarray | list | tuple):
            array = as_array(candidate)
            if array is not None and array.ndim and len(array) == len(samples):
                return array
    return None
