"""Comparing the data with those that a run stored, so that no outdated data are used silently."""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np

from greedy.base.commands import command
from greedy.base.errors import UserError
from greedy.base.functions import is_function_name
from greedy.base.seeds import generators_restored
from greedy.base.text import first_names, legible, sides
from greedy.cache import Store
from greedy.data import (
    Dataset,
    Reading,
    Split,
    find_dataset,
    first_pass,
    load_dataset,
)
from greedy.data.folder import FolderSplit
from greedy.data.loading import folder_of
from greedy.data.mapstyle import PYTHON
from greedy.data.splits import spread_rows
from greedy.runs.directory import SPLITS, RunDirectory
from greedy.runs.file_table import FileChanges, FileTable
from greedy.runs.state import RunState

COMPARED_IMAGES = 64  # of each split
COMPARED_LABELS = 10_000  # of each split, if labels are known only by reading samples
READ_ROWS = 256  # at a time
# The change that another version of a decoder may make: at most, as a share of the values' range,
# and on average, as a share of their standard deviation.
MAX_CHANGE, MEAN_CHANGE = 0.03, 0.01


def is_stage0_current(
    state: RunState, dataset: Dataset, *, again: bool = False, ignore: bool = False
) -> bool:
    """Returns whether stage 0 is complete and was written from this data set.

    Args:
        state: of the run.
        dataset: to be compared with the stored one.
        again: whether stage 0 is to be written again if the data have changed.
        ignore: whether changes of the data are ignored.

    Raises:
        UserError: the data have changed and neither ``again`` nor ``ignore`` is set.
    """
    run = state.run
    if state.stage_state(0) != "complete":
        return False
    if (
        again
        and isinstance(dataset.train, FolderSplit)
        and FileTable.read(run.stage_dir(0)) is None
    ):
        return False  # no table to compare with
    if ignore or (differences := describe_changes(state, dataset)) is None:
        return True
    if again:
        return False
    raise _changed_error(run, dataset.name, differences)


def describe_changes(state: RunState, dataset: Dataset) -> str | None:
    """Returns in few words how a data set differs from the one that stage 0 was written from;
    ``None`` if it does not, or if that cannot be known."""
    if not isinstance(dataset.train, FolderSplit):
        seed = state.complete_record(0).data_choices.pass_seed
        drawn = first_pass(dataset, state.run.recipe.seed if seed is None else seed)
        again = dataset if seed is None else drawn
        with generators_restored():
            return ", ".join(_differences(state, drawn, again)) or None
    run = state.run
    before = FileTable.read(run.stage_dir(0))
    if before is None:
        return None
    root, now = dataset.train.root, file_table_of(dataset)
    assert now is not None
    changes = now.changed_since(before, root)
    if changes.changed or changes.new or changes.gone:
        return _describe_files(changes)
    if not np.array_equal(now.times, before.times):
        # The next call need not read these files again. Skipped if the run cannot be written to.
        with suppress(UserError, OSError), run.write_lock():
            now.write(run.stage_dir(0))
    return None


def describe_folder_changes(run: RunDirectory) -> str | None:
    """Returns in few words how the image folder of a run has changed; ``None`` if it has not, does
    not exist here, or the run's data are no folder."""
    data = run.recipe.data
    root = folder_of(data.name)
    if root is None or FileTable.read(run.stage_dir(0)) is None:
        return None
    try:
        if not root.is_dir():
            return None
        dataset = load_dataset(data.name, image_size=data.image_size, reading=Reading.of(data))
        return describe_changes(RunState.read(run), dataset)
    except UserError as error:
        return str(error)
    except OSError as error:
        return f"{root} cannot be read: {error.strerror}"


def require_unchanged(
    run: RunDirectory, data_dir: Path | None = None, allow_function: bool = False
) -> None:
    """Raises ``UserError`` if the run's data have changed since stage 0 was written. Data that are
    not on this machine are not compared. ``data_dir`` and ``allow_function`` are as in
    ``greedy.data.load_dataset``."""
    name, reading = run.recipe.data.name, Reading.of(run.recipe.data)
    if folder_of(name) is not None:
        require_unchanged_folder(run)
        return
    dataset = find_dataset(name, data_dir, allow_function=allow_function, reading=reading)
    if dataset is not None:
        is_stage0_current(RunState.read(run), dataset)


def require_unchanged_folder(run: RunDirectory) -> None:
    """Raises ``UserError`` if the run's image folder has changed since stage 0 was written."""
    if differences := describe_folder_changes(run):
        raise _changed_error(run, run.recipe.data.name, differences)


def file_table_of(dataset: Dataset) -> FileTable | None:
    """Returns the table, without digests, of an image folder's files: those of the training split,
    of the test split, and those skipped. ``None`` for other data sets."""
    train, test = dataset.train, dataset.test
    if isinstance(train, FolderSplit) and isinstance(test, FolderSplit):
        skipped = [train.root / name for name in dataset.skipped]
        return FileTable.from_files(train.root, [*train.files, *test.files, *skipped])
    return None


def _changed_error(run: RunDirectory, name: str, differences: str) -> UserError:
    fault = f"{name} holds other data than {run.path} was started with ({differences})"
    if name == PYTHON:
        return UserError(
            f"{fault}: choose another run directory to train on the data as they are now, or "
            f"resume with the stored data by ignore_changes=True"
        )
    is_function = folder_of(name) is None and is_function_name(name)
    data = ("--data", name) if is_function else ()  # a function is called only if named here
    return UserError(
        f"{fault}: {command('train', '--run', run.path, *data, '--retrain', 0)} trains the run on "
        f"the data as they are now, another run directory leaves this run unchanged, and "
        f"--ignore-changes (in Python ignore_changes=True) resumes with the stored data"
    )


def _describe_files(changes: FileChanges) -> str:
    kinds = (("changed", changes.changed), ("new", changes.new), ("gone", changes.gone))
    parts = [f"{len(names):,} {kind}: {first_names(names)}" for kind, names in kinds if names]
    return f"of {changes.files:,} files {'; '.join(parts)}"


def _differences(state: RunState, dataset: Dataset, again: Dataset) -> Iterator[str]:
    """Yields how a data set differs from what stage 0 stored, in words. Images that are read
    ``again`` may be drawn anew."""
    data = state.complete_record(0)
    rows = {split: len(getattr(dataset, split)) for split in SPLITS}
    if rows != data.rows or dataset.train.shape != data.row_shape:
        shape = sides(data.row_shape)
        yield f"there were {data.rows['train']} + {data.rows['test']} rows of {shape}"
        return
    names = dataset.class_names and [legible(name) for name in dataset.class_names]
    numbers = [str(number) for number in range(len(data.class_names))]
    if names and data.class_names not in (names, numbers):
        yield f"the classes were {first_names(data.class_names)}"
    for name in SPLITS:
        split, store = getattr(dataset, name), state.run.open_store(0, name)
        if samples := _changed_labels(split, store):
            yield f"{len(samples):,} labels of the {name} split: samples {first_names(samples)}"
        if samples := _changed_images(split, getattr(again, name), store):
            compared = min(COMPARED_IMAGES, store.rows)
            yield (
                f"{len(samples)} of {compared} images of the {name} split that were compared: "
                f"samples {first_names(samples)}"
            )


def _changed_labels(split: Split, store: Store) -> list[int]:
    """Returns the samples whose labels differ from the stored ones: of all samples if the split
    has a list of labels, else of ``COMPARED_LABELS``. The list is only a hint, since it may differ
    from the labels that come with the samples, which are stored."""
    if split.labels is None:
        rows = spread_rows(store.rows, COMPARED_LABELS)
    else:
        rows = np.flatnonzero(split.labels[store.index] != store.labels)
    samples, stored = store.index[rows], store.labels[rows]
    parts = [slice(start, start + READ_ROWS) for start in range(0, len(rows), READ_ROWS)]
    changed = [samples[part][split.read(samples[part])[1] != stored[part]] for part in parts]
    return sorted(sample for part in changed for sample in part.tolist())


def _changed_images(split: Split, again: Split, store: Store) -> list[int]:
    """Returns the samples, of ``COMPARED_IMAGES``, whose images differ from the stored ones. Images
    that differ when they are read ``again`` are transformed at random and do not count."""
    rows = spread_rows(store.rows, COMPARED_IMAGES)
    samples = store.index[rows]
    images = split.read(samples)[0].astype(np.float32)
    stored = np.concatenate([store.read_rows(0, row, row + 1) for row in rows]).astype(np.float32)
    differ = ~_are_close(images, stored)
    if differ.any():
        differ &= _are_close(again.read(samples)[0].astype(np.float32), images)
    return sorted(samples[differ].tolist())


def _are_close(images: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Returns which of n images (n, C, H, W) differ by no more than another version of a decoder
    may change. The limits are per channel, since a channel may be a feature with another scale."""
    difference, axes = np.abs(images - others), (0, 2, 3)
    max_limit = MAX_CHANGE * np.ptp(others, axes)
    mean_limit = MEAN_CHANGE * others.std(axes, dtype=np.float64)
    close = (difference.max((2, 3)) <= max_limit) & (difference.mean((2, 3)) <= mean_limit)
    return close.all(axis=1)
