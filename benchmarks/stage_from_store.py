"""The time of training from a store, compared with training from the same activations in memory.

Prints the time of an epoch from a uint8 store on disk, read window by window, over that of an epoch
from a float32 tensor: for stage 2 of VGG8B at half width on CIFAR-10 shapes, and for stage 2 of the
3x1024 MLP. Ratios are medians over interleaved pairs of epochs.
"""

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from torch import Tensor, nn

from greedy.cache import Store, StoreWriter, fit_encoding
from greedy.losses import PredSim
from greedy.models import Shape, cut, mlp, seeded, shapes, vgg8b
from greedy.recipes import load
from greedy.runs.events import Reporter
from greedy.steps.step import Learner
from greedy.steps.strategies import Greedy
from greedy.stores.source import Batch, Source
from greedy.training.loop import Epochs
from greedy.training.schedule import Milestones

RECIPE = load("cifar10/vgg8b-predsim", ["training.epochs=1"])
BATCH = RECIPE.training.batch_size
CLASSES = 10
CPU = torch.device("cpu")


@dataclass(frozen=True, kw_only=True)
class InMemory(Source):
    """A source whose epochs come from a float32 tensor."""

    values: Tensor
    classes: Tensor

    def epoch_batches(self, *what: Any, **more: Any) -> Any:
        return InMemoryEpoch(self.values, self.classes)


class InMemoryEpoch:
    """The permuted rows of an epoch of ``InMemory``."""

    def __init__(self, values: Tensor, labels: Tensor) -> None:
        self.values, self.labels, self.rows = values, labels, len(labels)

    def __iter__(self) -> Iterator[Batch]:
        for rows in torch.randperm(self.rows).split(BATCH):
            yield Batch(self.labels[rows], self.values[rows].__getitem__)


def activations(rows: int, shape: Shape) -> np.ndarray:
    """Returns activations like those of a trained stage: leaky ReLU of normal numbers."""
    values = np.random.default_rng(0).standard_normal((rows, *shape), dtype=np.float32)
    return np.where(values > 0, values, 0.01 * values)


def write(path: Path, values: np.ndarray, labels: np.ndarray) -> Store:
    """Writes the activations as a uint8 store and opens it."""
    encoding = fit_encoding("uint8", values[:2048])
    with StoreWriter(
        path,
        rows=len(values),
        views=1,
        encoding=encoding,
        compressor="lz4",
        labels=labels,
        index=np.arange(len(values)),
    ) as writer:
        writer.append(values)
    return Store(path)


def learner(network: nn.Sequential, image: Shape) -> Learner:
    """Returns stage 2 of a network, ready to train."""
    stages = cut(network)
    stage, shape = stages[1], shapes(stages, image)[1]
    loss = PredSim()
    with seeded(0, "benchmark"):
        heads = loss.heads(shape.hidden, CLASSES)
    learner = Learner(stage, heads, loss, CLASSES, "float32")
    learner.optimizer = torch.optim.Adam(learner.parameters(), lr=5e-4, fused=True)
    return learner


def ratio(network: nn.Sequential, image: Shape, rows: int, pairs: int, directory: Path) -> float:
    """Measures the median ratio, over pairs of epochs, of the time from a store to that from
    memory."""
    learning = learner(network, image)
    shape = shapes(cut(network), image)[1].input
    values, labels = activations(rows, shape), np.random.default_rng(1).integers(0, CLASSES, rows)
    store = write(directory / "store", values, labels)
    stores = {"train": store, "test": write(directory / "test", values[:2], labels[:2])}
    disk = Source(1, directory / "store", stores, CPU, 0)
    memory = InMemory(
        1,
        directory / "store",
        stores,
        CPU,
        0,
        values=torch.from_numpy(values),
        classes=torch.from_numpy(labels),
    )

    def seconds(source: Source) -> float:
        schedule = Milestones(5e-4, 0.25, [])
        strategy = Greedy(learning)
        epochs = Epochs(strategy, source, [shape], schedule, RECIPE, Reporter(), ample_memory=True)
        start = time.perf_counter()
        list(epochs)
        return time.perf_counter() - start

    seconds(disk), seconds(memory)
    return statistics.median(seconds(disk) / seconds(memory) for _ in range(pairs))


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@click.option("--pairs", default=5, show_default=True, help="Interleaved pairs of epochs.")
def main(as_json: bool, pairs: int) -> None:
    """Print the time of training from a store over that of training from memory."""
    cases: dict[str, Callable[[Path], float]] = {
        "conv": lambda d: ratio(
            vgg8b(3, 32, CLASSES, feature_multiplier=0.5, dropout=0.2), (3, 32, 32), 1024, pairs, d
        ),
        "mlp": lambda d: ratio(mlp(dropout=0.025), (1, 28, 28), 30_000, pairs, d),
    }
    ratios = {}
    for name, case in cases.items():
        with tempfile.TemporaryDirectory() as directory:
            ratios[name] = round(case(Path(directory)), 4)
    if as_json:
        click.echo(json.dumps(ratios))
    else:
        for name, value in ratios.items():
            click.echo(f"{name}: {value:.3f} times the time of training from memory")


if __name__ == "__main__":
    main()
