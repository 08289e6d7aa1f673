"""Size, error and speed of each encoding and compressor, on the activations of a trained network.

Trains a narrow VGG8B briefly and writes the frozen output of every stage with every encoding and
compressor. Prints, as a Markdown table, the bytes on disk for each value (of everything in the
store: chunks, labels, index, metadata), the error of the encoding, and the rates of writing
(encoding, compressing, to the disk) and of reading (checksum, decompressing, from the page cache)
in MB of float32 a second: medians of interleaved repetitions. Draws bytes against error and rate.
"""

import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray

from greedy import GreedyTrainer
from greedy.cache import COMPRESSORS, ENCODINGS, Encoding, Store, StoreWriter, fit_encoding
from greedy.cache.shards import CRC_BYTES
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
    """Facts about a stage's output."""

    stage: int
    row_shape: tuple[int, ...]
    chunk_rows: int
    negative_percent: float
    metadata_bytes_a_value: float


@dataclass
class Row:
    """The measurements of a stage's output in one encoding and compressor."""

    stage: int
    encoding: str
    compressor: str
    bytes_a_value: float
    error_percent: float
    write_mb_s: float
    read_mb_s: float


def sample(split: Split, rows: int) -> ArraySplit:
    """Returns some rows of a split, drawn at random."""
    drawn = np.random.default_rng(0).permutation(len(split))[:rows]
    return ArraySplit(*split.read(drawn))


def train(name: str, directory: Path) -> Iterator[Activations]:
    """Trains a network. Yields the frozen output (rows, ...) of each stage but the last."""
    whole = load_dataset(name)
    train, test = sample(whole.train, ROWS), sample(whole.test, TEST_ROWS)
    data = Dataset(whole.name, train, test, whole.class_names)
    channels, side, _ = train.shape
    network = vgg8b(channels, side, len(whole.class_names or ()), feature_multiplier=0.25)
    settings: dict[str, Any] = {"epochs": EPOCHS, "batch_size": 64, "learning_rate": 5e-4}
    settings |= {"views": 1, "encoding": "float32", "compressor": "none"}
    trainer = GreedyTrainer(network, run_dir=directory, device="cpu", **settings)
    trainer.prepare(data)
    for number in range(1, CONVOLUTIONS + 2):
        trainer.train_stage(number)
        yield Store(trainer.run.store_path(number) / "train").load()[0]


def write(path: Path, values: Activations, encoding: Encoding, compressor: str) -> None:
    """Writes a store of the activations."""
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
    """Returns the standard deviation of the decoded less the original values, in percent of that of
    the original values."""
    difference = encoding.decode_array(encoding.encode(values)) - values
    return float(100 * difference.std() / values.std())


def measure(stage: int, values: Activations, directory: Path) -> Iterator[Row]:
    """Yields the row of a stage's output for every encoding and compressor."""
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


def describe(number: int, values: Activations, directory: Path) -> Stage:
    """Returns the facts about a stage's output, and about its uint8 store."""
    store = Store(directory / f"{number}-uint8-none-0")
    chunks = store.layout.chunks * (store.chunk_rows * store.encoding.stored_row_bytes + CRC_BYTES)
    return Stage(
        number,
        values.shape[1:],
        store.chunk_rows,
        negative_percent=round(100 * float((values < 0).mean()), 1),
        metadata_bytes_a_value=round((store.disk_bytes - chunks) / values.size, 4),
    )


def over_convolutions(rows: list[Row], values: dict[int, int], encoding: str, by: str) -> Row:
    """Returns the mean of the convolutional stages' rows for one encoding and compressor, weighted
    by their numbers of values."""
    chosen = [
        row
        for row in rows
        if (row.encoding, row.compressor) == (encoding, by) and row.stage <= CONVOLUTIONS
    ]
    counts = np.array([values[row.stage] for row in chosen])

    def mean(name: str, power: int) -> float:
        column = np.array([getattr(row, name) for row in chosen], float)
        return float(np.average(column**power, weights=counts) ** (1 / power))

    return Row(
        0,
        encoding,
        by,
        bytes_a_value=round(mean("bytes_a_value", 1), 4),
        error_percent=round(mean("error_percent", 2), 4),
        write_mb_s=round(mean("write_mb_s", -1)),
        read_mb_s=round(mean("read_mb_s", -1)),
    )


def table(stages: list[Stage], rows: list[Row], together: list[Row]) -> str:
    """Returns both tables in Markdown."""
    lines = [
        "| stage | row | rows a chunk | negative | of bytes a value: labels, index, metadata |",
        "|---|---|---|---|---|",
    ]
    for stage in stages:
        lines.append(
            f"| {stage.stage} | {'x'.join(map(str, stage.row_shape))} | {stage.chunk_rows} "
            f"| {stage.negative_percent:.0f} % | {stage.metadata_bytes_a_value:.4f} |"
        )
    numbers = [stage.stage for stage in stages]
    lines += [
        "",
        f"| encoding | compressor | {' | '.join(f'stage {number}' for number in numbers)} "
        "| convolutions | error, % | write, MB/s | read, MB/s |",
        "|" + "---|" * (len(numbers) + 6),
    ]
    for whole in together:
        sizes = [
            f"{row.bytes_a_value:.3f}"
            for row in rows
            if (row.encoding, row.compressor) == (whole.encoding, whole.compressor)
        ]
        lines.append(
            f"| {whole.encoding} | {whole.compressor} | {' | '.join(sizes)} "
            f"| {whole.bytes_a_value:.3f} | {whole.error_percent:.3f} "
            f"| {whole.write_mb_s} | {whole.read_mb_s} |"
        )
    return "\n".join(lines)


def draw(together: list[Row], path: Path) -> None:
    """Draws the bytes a value of the convolutional stages against the error and the reading
    rate."""
    import matplotlib as mpl  # noqa: PLC0415

    mpl.use("svg")
    from matplotlib import pyplot as plt  # noqa: PLC0415

    mpl.rcParams.update({"svg.hashsalt": "greedy", "svg.fonttype": "none", "font.size": 9})
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
    markers = dict(zip(COMPRESSORS, "os^", strict=True))
    colours = {name: f"C{number}" for number, name in enumerate(ENCODINGS)}
    for axis, column in zip(axes, ("error_percent", "read_mb_s"), strict=True):
        for row in together:
            axis.plot(
                row.bytes_a_value,
                getattr(row, column),
                markers[row.compressor],
                color=colours[row.encoding],
            )
        axis.set_xlabel("bytes a value on disk")
        axis.set_xlim(left=0)
        axis.grid(alpha=0.3)
    axes[0].set_yscale("symlog", linthresh=0.01)
    axes[0].set_ylim(bottom=0)
    axes[0].set_ylabel("error, % of standard deviation")
    axes[1].set_ylabel("read, MB of float32 a second")
    axes[1].set_ylim(bottom=0)
    handles = [
        *(axes[1].plot([], [], "o", color=colour, label=n)[0] for n, colour in colours.items()),
        *(axes[1].plot([], [], mark, color="grey", label=n)[0] for n, mark in markers.items()),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False)
    figure.savefig(path, metadata={"Date": None})


@click.command()
@click.option("--data", default="fashion-mnist-sample", show_default=True, help="Data set.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def main(data: str, as_json: bool) -> None:
    """Print size, error and speed of every encoding and compressor, and draw them."""
    if find_spec("matplotlib") is None:
        raise click.UsageError("the picture needs matplotlib: pip install '.[plot]'")
    stages, rows, values = list[Stage](), list[Row](), dict[int, int]()
    with tempfile.TemporaryDirectory() as directory:
        for number, output in enumerate(train(data, Path(directory) / "run"), start=1):
            with tempfile.TemporaryDirectory(dir=directory) as place:
                rows += measure(number, output, Path(place))
                stages.append(describe(number, output, Path(place)))
            values[number] = output.size
    together = [
        over_convolutions(rows, values, name, compressor)
        for name in ENCODINGS
        for compressor in COMPRESSORS
    ]
    draw(together, PICTURE)
    if as_json:
        documents: dict[str, list[Any]] = {"stages": stages, "convolutions": together, "rows": rows}
        listed = {name: list(map(asdict, entries)) for name, entries in documents.items()}
        click.echo(json.dumps(listed))
    else:
        click.echo(table(stages, rows, together))


if __name__ == "__main__":
    main()
