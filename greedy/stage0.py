"""Stage 0: the data set, decoded and shuffled once."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from greedy.build import require_one_logit_a_class
from greedy.cache import Encoding, Store, StoreWriter, pixels
from greedy.data import Dataset, Split, checked
from greedy.data.labels import require_classes
from greedy.data.modes import Kind
from greedy.errors import UserError
from greedy.files import canonical, digest
from greedy.manifest import DataChoices, StageRecord, StoreRecord
from greedy.models import Shape
from greedy.recipes import Recipe
from greedy.reporting import Reporter
from greedy.runs import SPLITS, RunDirectory, new_stage
from greedy.seeds import numpy_generator
from greedy.text import legible
from greedy.versions import versions

READ_ROWS = 1024  # rows decoded at a time
COMPARED_ROWS = 16  # of a split, between data and what a run was begun with
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
    run.begin()
    with new_stage(run.stage(0)) as directory:
        for name in SPLITS:
            split: Split = getattr(dataset, name)
            index = numpy_generator(run.recipe.seed, "rows", name).permutation(len(split))
            labels[name], rows[name] = np.empty(len(split), np.int64), index
            with StoreWriter(
                directory / "activations.zarr" / name,
                rows=len(split),
                views=1,
                encoding=stored_encoding(split),
                compressor=COMPRESSOR,
                labels=labels[name],
                index=index,
                encoded=split.dtype == np.uint8,
            ) as writer:
                for images in _read(split, index, labels[name]):
                    writer.append(images)
                    if name == "train":
                        moments.add(images)
            written[name] = writer.summary
        require_classes(dataset.name, _in_order(labels, rows), dataset.class_names)
        class_names = dataset.class_names or _numbered(labels)
        if output is not None:
            require_one_logit_a_class(output, len(class_names))
        encoding = stored_encoding(dataset.train).name
        store = StoreRecord.of(written, encoding, COMPRESSOR, views=1)
        seed = run.recipe.seed
        return StageRecord(
            stage=0,
            name=dataset.name,
            lineage=digest(canonical({"data": store.digests, "seed": seed})),
            recipe=run.settings,
            row_shape=dataset.train.shape,
            class_names=class_names,
            network=network,
            resolved=moments.mean_and_std() | _of_files(dataset),
            store=store,
            rows={name: len(labels[name]) for name in SPLITS},
            seconds=time.perf_counter() - started,
            versions=versions(),
        ).write(directory)


def readable(recipe: Recipe, dataset: Dataset, reporter: Reporter) -> Dataset:
    """Returns the data set without the image files that cannot be read, where the recipe skips
    these; else they are refused, all at once."""
    skip = recipe.data.broken == "skip"
    dataset = checked(dataset, skip=skip, progress=reporter.files_checked)
    for note in dataset.notes:
        reporter.noted(note)
    return dataset


def pixels_of(data: StageRecord) -> Kind:
    """Which numbers the image files of a run hold; those of other data are not known."""
    return DataChoices.model_validate(data.resolved).pixels


def normalisation_of(recipe: Recipe, data: StageRecord) -> tuple[list[float], list[float]]:
    """Returns mean and deviation of each channel: the recipe's, which are of bytes scaled to
    [0, 1] where images are files, or those measured."""
    moments, given = DataChoices.model_validate(data.resolved), recipe.data
    if moments.pixels != "bytes" or given.mean is None or given.std is None:
        return moments.mean, moments.std
    return given.mean, given.std


def require_same_data(run: RunDirectory, dataset: Dataset) -> None:
    """Refuses data other than those the run was begun with, as far as sizes and a few rows of each
    split tell. Images that are others when read again, transformed at random, tell nothing."""
    data = run.complete(0)
    rows = {split: len(getattr(dataset, split)) for split in SPLITS}
    if rows != data.rows or dataset.train.shape != data.row_shape:
        begun = (
            f"{data.rows['train']} + {data.rows['test']} rows of "
            f"{'x'.join(map(str, data.row_shape))}"
        )
    elif not all(_has_rows_of(getattr(dataset, s), run.open_store(0, s)) for s in SPLITS):
        begun = "of the same size, with other images or labels"
    else:
        return
    raise UserError(f"{run.path} was begun with other data ({begun}): choose another run_dir")


def _has_rows_of(split: Split, store: Store) -> bool:
    rows = np.unique(np.linspace(0, store.rows - 1, COMPARED_ROWS).astype(int))
    images, labels = split.read(store.index[rows])
    if not np.array_equal(labels, store.labels[rows]):
        return False
    stored = np.concatenate([store.read_rows(0, row, row + 1) for row in rows])
    again, _ = split.read(store.index[rows])
    return _alike(images, stored) or not _alike(images, again)


def _alike(images: np.ndarray, others: np.ndarray) -> bool:
    """Whether images (n, C, H, W) differ by no more than another version of a decoder makes."""
    difference = np.abs(images.astype(np.float32) - others).mean()
    return bool(difference <= 0.01 * others.std(dtype=np.float64))


def stored_encoding(split: Split) -> Encoding:
    """How a split's images are stored."""
    return pixels(split.shape) if split.dtype == np.uint8 else Encoding("float32", split.shape)


def _of_files(dataset: Dataset) -> dict[str, Any]:
    """What the record says of image files."""
    pixels = {"pixels": dataset.pixels} if dataset.pixels else {}
    skipped = {legible(file): legible(why) for file, why in dataset.skipped.items()}
    return pixels | ({"skipped": skipped} if skipped else {})


def _read(split: Split, index: np.ndarray, labels: np.ndarray) -> Iterator[np.ndarray]:
    """The split's images in the order of ``index``; its labels go into ``labels``."""
    for start in range(0, len(index), READ_ROWS):
        rows = slice(start, start + READ_ROWS)
        images, labels[rows] = split.read(index[rows])
        yield images


def _in_order(labels: dict[str, np.ndarray], rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The labels of each split in the order of its samples, of which ``rows`` are the numbers."""
    return {split: values[np.argsort(rows[split])] for split, values in labels.items()}


def _numbered(labels: dict[str, np.ndarray]) -> list[str]:
    return [str(i) for i in range(1 + max(int(values.max()) for values in labels.values()))]
