"""The memory that training from a large store takes.

Trains a convolution whose input, rows of 128x32x32 values, is a uint8 store of more than ten times
the budget for holding a store, by `GreedyTrainer.train_stage` in a new process. Prints how far the
peak of that process's anonymous resident memory (Linux's RssAnon, without the page cache, which the
system takes back when it needs it) exceeds the memory of a process that only imports torch. The
limit is the budget plus 1 GiB.
"""

import json
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import click
import torch
from torch import nn
from torch.utils.data import TensorDataset

from greedy import GreedyTrainer
from greedy.cache import Store
from greedy.data import dataset_from_torch
from greedy.losses import Pred

RAM_BUDGET = 64 * 2**20
ALLOWANCE = 2**30
ROWS = 6144
TEST_ROWS = 256
BARE_TORCH = "import torch; print(open('/proc/self/status').read())"


class PeakMemory:
    """Measures the peak of this process's anonymous resident memory inside the ``with``, in
    ``bytes``."""

    def __enter__(self) -> "PeakMemory":
        self.bytes = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._sample)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._ended.wait(0.005):
            status = Path("/proc/self/status").read_text(encoding="ascii")
            self.bytes = max(self.bytes, anonymous(status))


def anonymous(status: str) -> int:
    """Returns the bytes of RssAnon in a process's status file."""
    line = next(line for line in status.splitlines() if line.startswith("RssAnon:"))
    return 1024 * int(line.split()[1])


def trainer(run: Path) -> GreedyTrainer:
    """Returns the trainer of two convolutions and an output layer, of which the second convolution
    is measured."""
    network = nn.Sequential(
        *(nn.Conv2d(3, 128, 3, padding=1), nn.BatchNorm2d(128), nn.LeakyReLU()),
        *(nn.Conv2d(128, 8, 3, padding=1), nn.BatchNorm2d(8), nn.LeakyReLU(), nn.MaxPool2d(2)),
        *(nn.Flatten(), nn.Linear(8 * 16 * 16, 10)),
    )
    budget = f"{RAM_BUDGET // 2**20}MiB"
    settings: dict[str, Any] = {"epochs": 1, "views": 1, "encoding": "uint8", "ram_budget": budget}
    return GreedyTrainer(network, run_dir=run, loss=Pred(), device="cpu", **settings)


def images(rows: int) -> TensorDataset:
    """Returns images of noise, which compresses worst."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(0, 256, (rows, 3, 32, 32), dtype=torch.uint8, generator=generator)
    return TensorDataset(values, torch.arange(rows) % 10)


def in_new_process(*arguments: str) -> str:
    """Runs Python with some arguments and returns its output."""
    command = [sys.executable, *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@click.option("--measure", type=click.Path(path_type=Path), hidden=True)
def main(as_json: bool, measure: Path | None) -> None:
    """Print the memory that training from a store of ten times the budget takes."""
    if measure:
        with PeakMemory() as peak:
            trainer(measure).train_stage(2)
        click.echo(peak.bytes)
        return
    with tempfile.TemporaryDirectory() as directory:
        run = Path(directory)
        first = trainer(run)
        first.prepare(dataset_from_torch(images(ROWS), images(TEST_ROWS)))
        first.train_stage(1)
        store_bytes = Store(first.run.store_path(1) / "train").disk_bytes
        peak_bytes = int(in_new_process(__file__, "--measure", str(run)))
    beyond = peak_bytes - anonymous(in_new_process("-c", BARE_TORCH))
    limit = RAM_BUDGET + ALLOWANCE
    document = {
        "ram_budget_bytes": RAM_BUDGET,
        "store_bytes": store_bytes,
        "anonymous_bytes_beyond_torch": beyond,
        "limit_bytes": limit,
        "within_limit": store_bytes >= 10 * RAM_BUDGET and beyond <= limit,
    }
    if as_json:
        click.echo(json.dumps(document))
    else:
        for name, value in document.items():
            click.echo(f"{name}: {value}")


if __name__ == "__main__":
    main()
