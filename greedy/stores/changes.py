"""What has changed in the data since a run stored them, so that nothing old is used silently."""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np

from greedy.base.commands import command
from greedy.base.errors import UserError
from greedy.base.functions import is_function_name
from greedy.base.text import first_names, legible
from greedy.cache import Store
from greedy.data import Dataset, Reading, Split, find_dataset, load_dataset
from greedy.data.folder import FolderSplit
from greedy.data.loading import folder_of
from greedy.data.mapstyle import PYTHON
from greedy.data.randomness import generators_restored
from greedy.data.splits import spread_rows
from greedy.runs.directory import SPLITS, RunDirectory
from greedy.runs.file_table import FileChanges, FileTable

IMAGES = 64  # of a split that are compared with those stored
LABELS = 10_000  # of a split, where they are known only by reading
TOGETHER = 256  # rows read at a time
# What another version of a decoder may change, of the values' range and of their deviation.
AT_MOST, ON_AVERAGE = 0.03, 0.01


def is_prepared(
    run: RunDirectory, dataset: Dataset, *, again: bool = False, ignore: bool = False
) -> bool:
    """Whether stage 0 is there and of these data. Where it is of others and to be written
    ``again``, it is not; else that is a UserError, unless it is to ``ignore`` it."""
    if run.state(0) != "complete":
        return False
    if again and isinstance(dataset.train, FolderSplit) and FileTable.read(run.stage(0)) is None:
        return False  # nobody knows
    if ignore or (what := changes(run, dataset)) is None:
        return True
    if again:
        return False
    raise _changed(run, dataset.name, what)


def changes(run: RunDirectory, dataset: Dataset) -> str | None:
    """Returns what is different in a data set from what stage 0 was written from, in few words;
    None where nothing is, or nothing can be said."""
    if not isinstance(dataset.train, FolderSplit):
        with generators_restored():
            return ", ".join(_differences(run, dataset)) or None
    before = FileTable.read(run.stage(0))
    if before is None:
        return None
    root, now = dataset.train.root, files_of(dataset)
    assert now is not None
    found = now.changed_since(before, root)
    if found.changed or found.new or found.gone:
        return _in_words(found)
    if not np.array_equal(now.times, before.times):
        # Spares the next look the digests; where another process writes, or none can, it does not.
        with suppress(UserError, OSError), run.writing():
            now.write(run.stage(0))
    return None


def folder_changes(run: RunDirectory) -> str | None:
    """Returns what has changed in the image folder that a run was begun with; None where it is not
    there, or was none."""
    data = run.recipe.data
    root = folder_of(data.name)
    if root is None or FileTable.read(run.stage(0)) is None:
        return None
    try:
        if not root.is_dir():
            return None
        return changes(
            run, load_dataset(data.name, image_size=data.image_size, reading=Reading.of(data))
        )
    except UserError as error:
        return str(error)
    except OSError as error:
        return f"{root} cannot be looked at: {error.strerror}"


def require_unchanged(
    run: RunDirectory, data_dir: Path | None = None, allow_function: bool = False
) -> None:
    """Raises UserError where the data have changed that a run was begun with, as far as they are
    here; ``data_dir`` and ``allow_function`` are those of ``greedy.data.load_dataset``."""
    name, reading = run.recipe.data.name, Reading.of(run.recipe.data)
    if folder_of(name) is not None:
        require_unchanged_folder(run)
        return
    found = find_dataset(name, data_dir, allow_function=allow_function, reading=reading)
    if found is not None:
        is_prepared(run, found)


def require_unchanged_folder(run: RunDirectory) -> None:
    """Raises UserError where the image folder has changed that a run was begun with."""
    if what := folder_changes(run):
        raise _changed(run, run.recipe.data.name, what)


def files_of(dataset: Dataset) -> FileTable | None:
    """The files of an image folder's data set, without digests: of the training split, the test
    split, and those that are skipped; None for other data sets."""
    train, test = dataset.train, dataset.test
    if isinstance(train, FolderSplit) and isinstance(test, FolderSplit):
        skipped = [train.root / name for name in dataset.skipped]
        return FileTable.of(train.root, [*train.files, *test.files, *skipped])
    return None


def _changed(run: RunDirectory, name: str, what: str) -> UserError:
    told = f"{name} holds other data than {run.path} was begun with ({what})"
    if name == PYTHON:
        return UserError(
            f"{told}: another run directory trains on what is there now, and ignore_changes=True "
            f"goes on with what is stored"
        )
    function = folder_of(name) is None and is_function_name(name)
    named = ("--data", name) if function else ()  # it is called only if it is named
    return UserError(
        f"{told}: {command('train', '--run', run.path, *named, '--retrain', 0)} trains the run on "
        f"what is there now, another run directory leaves it as it is, and --ignore-changes (in "
        f"Python ignore_changes=True) goes on with what it has stored"
    )


def _in_words(found: FileChanges) -> str:
    kinds = (("changed", found.changed), ("new", found.new), ("gone", found.gone))
    parts = [f"{len(names):,} {kind}: {first_names(names)}" for kind, names in kinds if names]
    return f"of {found.files:,} files {'; '.join(parts)}"


def _differences(run: RunDirectory, dataset: Dataset) -> Iterator[str]:
    data = run.complete(0)
    rows = {split: len(getattr(dataset, split)) for split in SPLITS}
    if rows != data.rows or dataset.train.shape != data.row_shape:
        shape = "x".join(map(str, data.row_shape))
        yield f"there were {data.rows['train']} + {data.rows['test']} rows of {shape}"
        return
    names = dataset.class_names and [legible(name) for name in dataset.class_names]
    numbers = [str(number) for number in range(len(data.class_names))]
    if names and data.class_names not in (names, numbers):
        yield f"the classes were {first_names(data.class_names)}"
    for name in SPLITS:
        split, store = getattr(dataset, name), run.open_store(0, name)
        if other := _other_labels(split, store):
            yield f"{len(other):,} labels of the {name} split: samples {first_names(other)}"
        if other := _other_images(split, store):
            looked_at = min(IMAGES, store.rows)
            yield (
                f"{len(other)} of {looked_at} images of the {name} split that were looked at: "
                f"samples {first_names(other)}"
            )


def _other_labels(split: Split, store: Store) -> list[int]:
    """The samples whose labels are not those stored, of all where labels are known, else of a
    number that can be read. Labels that a set keeps apart may be others than its samples give,
    which were stored."""
    rows = np.arange(store.rows) if split.labels is not None else spread_rows(store.rows, LABELS)
    if split.labels is not None:
        rows = rows[split.labels[store.index] != store.labels]
    samples, stored = store.index[rows], store.labels[rows]
    parts = [slice(start, start + TOGETHER) for start in range(0, len(rows), TOGETHER)]
    other = [samples[part][split.read(samples[part])[1] != stored[part]] for part in parts]
    return sorted(sample for part in other for sample in part.tolist())


def _other_images(split: Split, store: Store) -> list[int]:
    """The samples whose images are not those stored, of a few. Those that are others each time they
    are read, transformed at random, tell nothing."""
    rows = spread_rows(store.rows, IMAGES)
    samples = store.index[rows]
    images = split.read(samples)[0].astype(np.float32)
    stored = np.concatenate([store.read_rows(0, row, row + 1) for row in rows]).astype(np.float32)
    differ = ~_alike(images, stored)
    if differ.any():
        again = split.read(samples)[0].astype(np.float32)
        differ &= _alike(again, images)
    return sorted(samples[differ].tolist())


def _alike(images: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Which images (n, C, H, W) differ in no channel, which may be a feature of a scale of its own,
    by more than another version of a decoder makes."""
    difference, axes = np.abs(images - others), (0, 2, 3)
    at_most = AT_MOST * np.ptp(others, axes)
    on_average = ON_AVERAGE * others.std(axes, dtype=np.float64)
    alike = (difference.max((2, 3)) <= at_most) & (difference.mean((2, 3)) <= on_average)
    return alike.all(axis=1)
