"""What each encoding and compressor costs and gives, on the activations of a trained network.

Trains a narrow VGG8B briefly and writes the frozen output of every stage with every encoding and
compressor. Prints, as a Markdown table, bytes a value on disk (everything in the store: chunks,
labels, index, metadata), the error of the encoding, and the rates of writing (encoding,
compressing, to the disk) and of reading (checksum, decompressing; to the page cache's speed) in
MB of float32 a second: medians of interleaved repetitions. Draws bytes against error and rate.
"""

import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import numpy as np
from numpy.typing import NDArray

from greedy import GreedyTrainer
from greedy.cache import COMPRESSORS, ENCODINGS, Encoding, Store, StoreWriter, fit_encoding
from greedy.data import Dataset, Split, load_dataset
from greedy.data.splits import ArraySplit
from greedy.models import vgg8b

ROWS, TEST_ROWS = 2048, 512
EPOCHS = [1, 1, 1, 2, 2, 2, 2, 1]
CONVOLUTIONS = 6  # of VGG8B; the stage after them is a linear layer
REPETITIONS = 3
PICTURE = Path(__file__).parents[1] / "docs" / "store-frontier.svg"

Activations = NDArray[np.float32]


@dataclass
class Stage:
    """What a stage's output is like."""

    stage: int
    row_shape: tuple[int, ...]
    chunk_rows: int
    negative_percent: float
    metadata_bytes_a_value: float


@dataclass
class Row:
    """One stage's output in one encoding and compressor."""

    stage: int
    encoding: str
    compressor: str
    bytes_a_value: float
    error_percent: float
    write_mb_s: float
    read_mb_s: float


def sample(split: Split, rows: int) -> ArraySplit:
    """Some of a split's rows, drawn at random."""
    drawn = np.random.default_rng(0).permutation(len(split))[:rows]
    return ArraySplit(*split.read(drawn))


def train(name: str, directory: Path) -> Iterator[Activations]:
    """The frozen output of each stage but the last, (rows, ...)."""
    whole = load_dataset(name)
    train, test = sample(whole.train, ROWS), sample(whole.test, TEST_ROWS)
    data = Dataset(whole.name, train, test, whole.class_names)
    channels, side, _ = train.shape
    classes = int(whole.class_names is None) * 10 or len(whole.class_names or ())
    network = vgg8b(channels, side, classes, feature_multiplier=0.25)
    settings = {"epochs": EPOCHS, "batch_size": 64, "learning_rate": 5e-4, "views": 1}
    stored = {"encoding": "float32", "compressor": "none"}
    trainer = GreedyTrainer(network, run_dir=directory, device="cpu", **settings, **stored)
    trainer.prepare(data)
    for number in range(1, CONVOLUTIONS + 2):
        trainer.train_stage(number)
        yield Store(trainer.run.store(number) / "train").load()[0]


def write(path: Path, values: Activations, encoding: Encoding, compressor: str) -> None:
    """A store of the activations."""
    rows = np.arange(len(values))
    with StoreWriter(
        path,
        rows=len(values),
        views=1,
        encoding=encoding,
        compressor=compressor,
        labels=rows,
        index=rows,
    ) as writer:
        writer.append(values)


def error_percent(values: Activations, encoding: Encoding) -> float:
    """Standard deviation of decoded less original, relative to that of the activations."""
    difference = encoding.decode_array(encoding.encode(values)) - values
    return float(100 * difference.std() / values.std())


def measure(stage: int, values: Activations, directory: Path) -> Iterator[Row]:
    """A row for every encoding and compressor."""
    encodings = {name: fit_encoding(name, values) for name in ENCODINGS}
    errors = {name: error_percent(values, encoding) for name, encoding in encodings.items()}
    pairs = [(name, compressor) for name in ENCODINGS for compressor in COMPRESSORS]
    writes: dict[tuple[str, str], list[float]] = {pair: [] for pair in pairs}
    reads: dict[tuple[str, str], list[float]] = {pair: [] for pair in pairs}
    sizes = {}
    for repetition in range(REPETITIONS):
        for name, compressor in pairs:
            path = directory / f"{stage}-{name}-{compressor}-{repetition}"
            start = time.perf_counter()
            write(path, values, encodings[name], compressor)
            written = time.perf_counter()
            Store(path).load()
            writes[name, compressor].append(written - start)
            reads[name, compressor].append(time.perf_counter() - written)
            sizes[name, compressor] = Store(path).disk_bytes
    for pair in pairs:
        yield Row(
            stage,
            *pair,
            bytes_a_value=round(sizes[pair] / values.size, 4),
            error_percent=round(errors[pair[0]], 4),
            write_mb_s=round(values.nbytes / 1e6 / statistics.median(writes[pair])),
            read_mb_s=round(values.nbytes / 1e6 / statistics.median(reads[pair])),
        )
