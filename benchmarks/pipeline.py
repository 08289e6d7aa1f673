"""Images a second of stages that two processes train, over those of one process that trains all.

A network of four equal convolutions and an output layer is trained jointly on random images, in
turn by one process and, with `parallel="stages"`, by two, each with a single thread. An epoch's
time is that from the end of the one before to its own, so what the processes exchange at the end
of an epoch, the evaluation and the checkpoint are in it. The ratio is that of the medians.
"""

import json
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import click
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.utils.data import TensorDataset

from greedy import GreedyTrainer
from greedy.runs.events import EpochReport, Reporter

CHANNELS, SIDE, CLASSES, BATCH, TEST_ROWS = 32, 16, 10, 64, 64


class Times(Reporter):
    """The times at which epochs ended."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def network_epoch_finished(self, reports: Sequence[EpochReport]) -> None:
        self.ends.append(time.perf_counter())


def random_images(rows: int) -> TensorDataset:
    """Returns random images, with as many channels as the convolutions have, and labels."""
    generator = torch.Generator().manual_seed(rows)
    shape = (rows, CHANNELS, SIDE, SIDE)
    images = torch.randint(256, shape, dtype=torch.uint8, generator=generator)
    return TensorDataset(images, torch.randint(CLASSES, (rows,), generator=generator))


def network() -> nn.Sequential:
    """Returns four convolutions and an output layer."""
    layers: list[nn.Module] = []
    for _ in range(4):
        layers += [nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1), nn.BatchNorm2d(CHANNELS)]
        layers += [nn.LeakyReLU(0.01)]
    return nn.Sequential(*layers, nn.AvgPool2d(4), nn.Flatten(), nn.Linear(16 * CHANNELS, CLASSES))


def train(rank: int, size: int, directory: str, rows: int, epochs: int) -> None:
    """Trains in one of ``size`` processes; the first writes the seconds of its epochs, except the
    first one."""
    torch.set_num_threads(1)
    if size > 1:
        dist.init_process_group("gloo", f"file://{directory}/meeting", rank=rank, world_size=size)
    times = Times()
    trainer = GreedyTrainer(
        network(),
        run_dir=Path(directory) / "run",
        device="cpu",
        reporter=times,
        parallel="stages" if size > 1 else "data",
        strategy="joint",
        epochs=epochs,
        batch_size=BATCH,
        precision="float32",
    )
    trainer.fit(random_images(rows), random_images(TEST_ROWS))
    if rank == 0:
        seconds = [end - start for start, end in zip(times.ends, times.ends[1:], strict=False)]
        (Path(directory) / "seconds.json").write_text(json.dumps(seconds))
    if size > 1:
        dist.destroy_process_group()


def epoch_seconds(size: int, rows: int, epochs: int) -> list[float]:
    """Returns the seconds of the epochs that ``size`` processes train."""
    with tempfile.TemporaryDirectory() as directory:
        mp.spawn(train, (size, directory, rows, epochs), nprocs=size)
        seconds: list[float] = json.loads((Path(directory) / "seconds.json").read_text())
    return seconds


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@click.option("--batches", default=60, show_default=True, help="Batches of an epoch.")
@click.option("--epochs", default=4, show_default=True, help="Epochs of a run, one not timed.")
@click.option("--runs", default=2, show_default=True, help="Runs of each, in turn.")
def main(as_json: bool, batches: int, epochs: int, runs: int) -> None:
    """Time one process and two that train the same stages."""
    os.environ["OMP_NUM_THREADS"] = "1"
    rows = batches * BATCH
    seconds: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(runs):
        for size in seconds:
            seconds[size] += epoch_seconds(size, rows, epochs)
    one, two = (rows / statistics.median(found) for found in seconds.values())
    result = {"one": round(one, 1), "two": round(two, 1), "ratio": round(two / one, 3)}
    if as_json:
        click.echo(json.dumps(result))
    else:
        click.echo(f"one process: {one:,.1f} images/s, two: {two:,.1f}, {two / one:.2f} times")


if __name__ == "__main__":
    main()
