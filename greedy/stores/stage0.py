"""Stage 0: the data set, decoded and shuffled once."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from greedy.base.errors import UserError
from greedy.base.files import canonical_json, digest
from greedy.base.seeds import numpy_generator
from greedy.base.text import first_names, legible
from greedy.base.versions import versions
from greedy.build.modules import require_one_logit_a_class
from greedy.cache import Encoding, StoreWriter, pixels
from greedy.data import Dataset, Split, check_files
from greedy.data.folder import FolderSplit
from greedy.data.labels import require_classes
from greedy.data.modes import Kind
from greedy.models import Shape
from greedy.recipes import Recipe
from greedy.runs.choices import DataChoices
from greedy.runs.directory import SPLITS, RunDirectory, new_stage
from greedy.runs.events import Reporter
from greedy.runs.file_table import FileTable
from greedy.runs.record import StageRecord, StoreRecord
from greedy.stores.changes import files_of

READ_ROWS = 1024  # rows decoded at a time
COMPRESSOR = "zstd"  # images are written once and decoded ahead of slow first stages


@dataclass
class Moments:
    """Sums over the pixels of each channel, of values in [0, 1] or as they are."""

    count: int = 0
    total: np.ndarray | float = 0.0
    squares: np.ndarray | float = 0.0

    def add(self, images: np.ndarray) -> None:
        """Takes in images (n, C, H, W)."""
        values = images.astype(np.float64) / (255 if images.dtype == np.uint8 else 1)
        self.count += values.size // values.shape[1]
        self.total = self.total + values.sum(axis=(0, 2, 3))
        self.squares = self.squares + np.square(values).sum(axis=(0, 2, 3))

    def mean_and_std(self) -> dict[str, list[float]]:
        """Mean and standard deviation of each channel; a constant channel has deviation 1."""
        mean = np.asarray(self.total) / self.count
        std = np.sqrt(np.maximum(np.asarray(self.squares) / self.count - mean**2, 0))
        return {"mean": mean.tolist(), "std": np.where(std < 1e-6, 1.0, std).tolist()}


def write_stage0(
    run: RunDirectory, dataset: Dataset, network: list[str], output: Shape | None = None
) -> StageRecord:
    """Writes both splits of a data set, rows permuted by the run's seed, and the record.

    ``network`` names the stages to come; ``output`` is the shape of its output where that is
    settled before the classes are known. The permutation is drawn once: row i is the same
    sample in every later store. The training rows' mean and deviation are measured on the way
    and kept under ``resolved``. Raises ``UserError`` for labels that are no classes, or an output
    that is not one value a class, ``StoreError`` for a value that is not finite.
    """
    started = time.perf_counter()
    moments = Moments()
    written, labels, rows = {}, {}, {}
    files = files_of(dataset)
    run.begin()
    with new_stage(run.stage(0)) as directory:
        for name in SPLITS:
            split: Split = getattr(dataset, name)
            index = numpy_generator(run.recipe.seed, "rows", name).permutation(len(split))
            labels[name], rows[name] = np.empty(len(split), np.int64), index
            place = directory / "activations.zarr" / name
            with _writer(place, split, labels[name], index) as writer:
                for samples, images in _read(split, index, labels[name]):
                    writer.append(images)
                    if files and isinstance(split, FolderSplit):  # still in the system's memory
                        before = 0 if name == "train" else len(dataset.train)
                        files.take_digests(split.root, before + samples)
                    if name == "train":
                        moments.add(images)
            written[name] = writer.summary
        require_classes(dataset.name, _in_order(labels, rows), dataset.class_names)
        class_names = dataset.class_names or _numbered(labels)
        if output is not None:
            require_one_logit_a_class(output, len(class_names))
        if files and isinstance(dataset.train, FolderSplit):
            skipped = np.arange(len(dataset.train) + len(dataset.test), len(files.names))
            files.take_digests(dataset.train.root, skipped)
            _require_at_rest(files, dataset)
            files.write(directory)
        encoding = stored_encoding(dataset.train).name
        store = StoreRecord.of(written, encoding, COMPRESSOR, views=1)
        seed = run.recipe.seed
        return StageRecord(
            stage=0,
            name=dataset.name,
            lineage=digest(canonical_json({"data": store.digests, "seed": seed})),
            recipe=run.settings,
            row_shape=dataset.train.shape,
            class_names=class_names,
            network=network,
            resolved=DataChoices.model_validate(moments.mean_and_std() | _of_files(dataset)),
            store=store,
            rows={name: len(labels[name]) for name in SPLITS},
            seconds=time.perf_counter() - started,
            versions=versions(),
        ).write(directory)


def readable(recipe: Recipe, dataset: Dataset, reporter: Reporter) -> Dataset:
    """Returns the data set without the image files that cannot be read, where the recipe skips
    these; else they are refused, all at once."""
    skip = recipe.data.broken == "skip"
    dataset = check_files(dataset, skip=skip, progress=reporter.files_checked)
    for note in dataset.notes:
        reporter.noted(note)
    return dataset


def pixels_of(data: StageRecord) -> Kind:
    """Which numbers the image files of a run hold; those of other data are not known."""
    return data.data_choices.pixels


def stored_encoding(split: Split) -> Encoding:
    """The encoding in which a split's images are stored."""
    return pixels(split.shape) if split.dtype == np.uint8 else Encoding("float32", split.shape)


def _of_files(dataset: Dataset) -> dict[str, Any]:
    """What the record says of image files."""
    pixels = {"pixels": dataset.pixels} if dataset.pixels else {}
    skipped = {legible(file): legible(why) for file, why in dataset.skipped.items()}
    return pixels | ({"skipped": skipped} if skipped else {})


def _writer(place: Path, split: Split, labels: np.ndarray, index: np.ndarray) -> StoreWriter:
    return StoreWriter(
        place,
        rows=len(split),
        views=1,
        encoding=stored_encoding(split),
        compressor=COMPRESSOR,
        labels=labels,
        index=index,
        encoded=split.dtype == np.uint8,
    )


def _read(
    split: Split, index: np.ndarray, labels: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The numbers and images of the split's samples, some at a time, in the order of ``index``;
    their labels go into ``labels``."""
    for start in range(0, len(index), READ_ROWS):
        rows = slice(start, start + READ_ROWS)
        images, labels[rows] = split.read(index[rows])
        yield index[rows], images


def _require_at_rest(files: FileTable, dataset: Dataset) -> None:
    """Raises UserError for files that were changed while they were read."""
    now = files_of(dataset)
    assert now is not None
    other = np.flatnonzero((now.sizes != files.sizes) | (now.times != files.times))
    if len(other):
        names = [files.names[row] for row in other]
        raise UserError(
            f"{len(names):,} files of {dataset.name} changed while they were read "
            f"({first_names(names)}): give the same command again"
        )


def _in_order(labels: dict[str, np.ndarray], rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The labels of each split in the order of its samples, of which ``rows`` are the numbers."""
    return {split: values[np.argsort(rows[split])] for split, values in labels.items()}


def _numbered(labels: dict[str, np.ndarray]) -> list[str]:
    return [str(i) for i in range(1 + max(int(values.max()) for values in labels.values()))]
