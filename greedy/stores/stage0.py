"""Writing stage 0: the data set, decoded and shuffled once."""

import time
from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from greedy.base.errors import UserError
from greedy.base.files import canonical_json, digest
from greedy.base.seeds import numpy_generator
from greedy.base.text import first_names, legible
from greedy.base.versions import versions
from greedy.build.fitting import require_one_logit_a_class
from greedy.cache import Encoding, StoreWriter, pixel_encoding
from greedy.data import Augmentation, Dataset, Split, check_files
from greedy.data.folder import FolderSplit
from greedy.data.labels import require_classes
from greedy.data.passes import read_batches
from greedy.models import Shape
from greedy.recipes import Recipe
from greedy.runs.choices import DataChoices
from greedy.runs.directory import SPLITS, RunDirectory, new_stage
from greedy.runs.events import Reporter
from greedy.runs.file_table import FileTable
from greedy.runs.record import STORE, StageRecord, StoreRecord
from greedy.stores.changes import file_table_of

READ_ROWS = 1024  # decoded at a time
COMPRESSOR = "zstd"  # compresses well; images are decoded ahead of the slow first stages


@dataclass
class ChannelStatistics:
    """Means and deviations of each channel over images, bytes scaled to [0, 1]; those of parts are
    merged (Chan et al., 1983), since differences of large sums have no digits left."""

    count: int = 0
    mean: np.ndarray | float = 0.0
    squares: np.ndarray | float = 0.0
    least: np.ndarray | float = np.inf
    most: np.ndarray | float = -np.inf

    def add(self, images: np.ndarray) -> None:
        """Adds images (n, C, H, W)."""
        values = images.astype(np.float64) / (255 if images.dtype == np.uint8 else 1)
        axes = (0, 2, 3)
        self.least = np.minimum(self.least, values.min(axis=axes))
        self.most = np.maximum(self.most, values.max(axis=axes))
        count, mean = values.size // values.shape[1], values.mean(axis=axes)
        total, off = self.count + count, mean - self.mean
        values -= mean[:, None, None]
        squares = np.square(values, out=values).sum(axis=axes)
        self.squares = self.squares + squares + off**2 * (self.count * count / total)
        self.mean, self.count = self.mean + off * (count / total), total

    def mean_and_std(self) -> dict[str, list[float]]:
        """Returns mean and standard deviation of each channel, 1 for a constant channel."""
        mean, std = np.asarray(self.mean), np.sqrt(np.asarray(self.squares) / self.count)
        return {"mean": mean.tolist(), "std": np.where(self.least == self.most, 1.0, std).tolist()}


def write_stage0(
    run: RunDirectory,
    dataset: Dataset,
    network: list[str],
    output: Shape | None = None,
    *,
    drawn: bool = False,
    fresh: bool = False,
) -> StageRecord:
    """Writes both splits of a data set, their rows permuted by the run's seed, and the record.

    The permutation is drawn once: row i is the same sample in every later store. The mean and
    standard deviation of the training rows go into the record's ``resolved``.

    Args:
        run: the run, whose lock is held.
        dataset: to be written.
        network: the names of the stages.
        output: the shape of the network's output if that is fixed, to be checked against the
            classes.
        drawn: whether training rows are drawn at random, so that they are read as in every pass.
        fresh: whether they are read again in every pass; view 0 is stored.

    Raises:
        UserError: a label is not a class, or the output does not have one value per class.
        StoreError: a value is not finite.
    """
    started = time.perf_counter()
    statistics = ChannelStatistics()
    written, labels, rows = {}, {}, {}
    files = file_table_of(dataset)
    augmentation = Augmentation.parse(run.recipe.data.augmentation)
    workers = run.recipe.data.num_workers if drawn else 0
    run.write_recipe()
    with new_stage(run.stage_dir(0)) as directory:
        for name, before in zip(SPLITS, (0, len(dataset.train)), strict=True):
            split: Split = getattr(dataset, name)
            index = numpy_generator(run.recipe.seed, "rows", name).permutation(len(split))
            labels[name], rows[name] = np.empty(len(split), np.int64), index
            reading = closing(_read(split, index, labels[name], workers))
            writing = _writer(directory / STORE / name, split, labels[name], index)
            with reading as parts, writing as writer:
                for samples, images in parts:
                    if name == "train":
                        augmentation.require_values(torch.from_numpy(images))
                        statistics.add(images)
                    writer.append(images)
                    if files and isinstance(split, FolderSplit):  # cached now
                        files.compute_digests(split.root, before + samples)
            written[name] = writer.summary
        require_classes(dataset.name, _in_order(labels, rows), dataset.class_names)
        class_names = dataset.class_names or _class_numbers(labels)
        if output is not None:
            require_one_logit_a_class(output, len(class_names))
        if files and isinstance(dataset.train, FolderSplit):
            skipped = np.arange(len(dataset.train) + len(dataset.test), len(files.names))
            files.compute_digests(dataset.train.root, skipped)
            _require_unmodified(files, dataset)
            files.write(directory)
        encoding = stored_encoding(dataset.train).name
        store = StoreRecord.from_summaries(written, encoding, COMPRESSOR, views=1)
        seed = run.recipe.seed
        passes = {"pass_seed": seed} if fresh else {}
        resolved = statistics.mean_and_std() | _file_fields(dataset) | passes
        return StageRecord(
            stage=0,
            name=dataset.name,
            lineage=digest(canonical_json({"data": store.digests, "seed": seed} | passes)),
            recipe_digest=run.recipe_digest,
            row_shape=dataset.train.shape,
            class_names=class_names,
            network=network,
            resolved=DataChoices.model_validate(resolved),
            store=store,
            rows={name: len(labels[name]) for name in SPLITS},
            seconds=time.perf_counter() - started,
            versions=versions(),
        ).write(directory)


def drop_unreadable_files(recipe: Recipe, dataset: Dataset, reporter: Reporter) -> Dataset:
    """Returns the data set without the image files that cannot be read if the recipe skips them.
    Otherwise raises ``UserError``, which names all of them."""
    skip = recipe.data.broken == "skip"
    dataset = check_files(dataset, skip=skip, progress=reporter.files_checked)
    for note in dataset.notes:
        reporter.noted(note)
    return dataset


def stored_encoding(split: Split) -> Encoding:
    """Returns the encoding in which a split's images are stored."""
    return (
        pixel_encoding(split.shape) if split.dtype == np.uint8 else Encoding("float32", split.shape)
    )


def _file_fields(dataset: Dataset) -> dict[str, Any]:
    """Returns the fields of ``resolved`` about image files."""
    pixels = {"pixels": dataset.pixels} if dataset.pixels else {}
    skipped = {legible(file): legible(reason) for file, reason in dataset.skipped.items()}
    return pixels | ({"skipped": skipped} if skipped else {})


def _writer(path: Path, split: Split, labels: np.ndarray, index: np.ndarray) -> StoreWriter:
    return StoreWriter(
        path,
        rows=len(split),
        views=1,
        encoding=stored_encoding(split),
        compressor=COMPRESSOR,
        labels=labels,
        index=index,
        encoded=split.dtype == np.uint8,
    )


def _read(
    split: Split, index: np.ndarray, labels: np.ndarray, workers: int | None
) -> Generator[tuple[np.ndarray, np.ndarray]]:
    """Yields the numbers and images of the split's samples, ``READ_ROWS`` at a time, in the order
    of ``index``; writes their labels into ``labels``. ``workers`` are as for ``read_batches``."""
    batches = [index[start : start + READ_ROWS] for start in range(0, len(index), READ_ROWS)]
    start = 0
    for batch, (images, read) in zip(batches, read_batches(split, batches, workers), strict=True):
        labels[start : start + len(batch)] = read
        start += len(batch)
        yield batch, images.numpy()


def _require_unmodified(files: FileTable, dataset: Dataset) -> None:
    """Raises ``UserError`` if files changed while they were read."""
    now = file_table_of(dataset)
    assert now is not None
    changed = np.flatnonzero((now.sizes != files.sizes) | (now.times != files.times))
    if len(changed):
        names = [files.names[row] for row in changed]
        raise UserError(
            f"{len(names):,} files of {dataset.name} changed while they were read "
            f"({first_names(names)}): give the same command again"
        )


def _in_order(labels: dict[str, np.ndarray], rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns the labels of each split in the order of its samples; ``rows`` has the sample of each
    label."""
    return {split: values[np.argsort(rows[split])] for split, values in labels.items()}


def _class_numbers(labels: dict[str, np.ndarray]) -> list[str]:
    return [str(i) for i in range(1 + max(int(values.max()) for values in labels.values()))]
