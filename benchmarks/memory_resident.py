"""The resident memory of a process that trains a network on a CPU, compared with its budget.

A budget counts tensors. The process also has its libraries, the working memory of operators, and
memory that the C library does not return. A narrow VGG11B, or with `--multiplier 3` the paper's
largest network, is trained on noise by `greedy.GreedyTrainer` in a new process and then evaluated.
The peak of the process's resident memory (Linux's VmHWM) is reset after each phase of a stage.
Prints a line for each stage: the counted memory of its step, the peak of each phase, and the
highest peak less the memory of a process that only imports the package, also as a multiple of the
counted memory. The limit of the whole process is the budget plus 1 GiB.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import click
import torch
from torch.utils.data import TensorDataset

from greedy import GreedyTrainer
from greedy.base.sizes import format_size, parse_size
from greedy.recipes import load
from greedy.results.evaluation import evaluate
from greedy.runs.choices import Choices
from greedy.runs.events import EpochReport, Reporter
from greedy.runs.record import StageRecord

ALLOWANCE = 2**30
BARE = "import greedy.trainer; print(open('/proc/self/status').read())"
PHASES = ("steps", "checkpoint", "store", "rest")


def resident(name: str, status: str) -> int:
    """Returns the bytes in a line of a process's status file: ``VmRSS``, the resident memory now,
    or ``VmHWM``, its peak."""
    line = next(line for line in status.splitlines() if line.startswith(f"{name}:"))
    return 1024 * int(line.split()[1])


def peak_since_last() -> int:
    """Returns the peak of this process's resident memory in bytes since the last call."""
    peak = resident("VmHWM", Path("/proc/self/status").read_text(encoding="ascii"))
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return peak


class Phases(Reporter):
    """Records the peaks of each stage by phase, in bytes. Evaluating the test images belongs to the
    phase `checkpoint`; saving the weights and fitting the ranges of an encoding belong to
    `store`."""

    def __init__(self) -> None:
        self.stages: list[dict[str, Any]] = []
        self._peaks = dict.fromkeys(PHASES, 0)
        self._writing = False

    def _passed(self, phase: str) -> None:
        self._peaks[phase] = max(self._peaks[phase], peak_since_last())

    def stage_started(self, number: int, name: str, epochs: int, choices: Choices) -> None:
        self._passed("rest")
        self._writing = False

    def writing_started(self, number: int, split: str, rows: int) -> None:
        self._passed("store")
        self._writing = True

    def batch_finished(self, rows: int) -> None:
        self._passed("store" if self._writing else "steps")

    def epoch_finished(self, report: EpochReport) -> None:
        self._passed("checkpoint")

    def stage_finished(self, record: StageRecord) -> None:
        self._passed("store" if self._writing else "rest")
        about = {"stage": record.stage, "name": record.name}
        about |= {name: getattr(record.choices, name) for name in ("memory_mode", "micro_batch")}
        counted = record.choices.planned_peak_bytes
        self.stages.append(about | {"counted_bytes": counted, "resident_bytes": self._peaks})
        self._peaks = dict.fromkeys(PHASES, 0)
        click.echo(f"stage {record.stage} of {len(record.network)}", err=True)


def noise(rows: int) -> TensorDataset:
    """Returns random images of CIFAR-10's shape, of ten classes."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(0, 256, (rows, 3, 32, 32), dtype=torch.uint8, generator=generator)
    return TensorDataset(values, torch.arange(rows) % 10)


def measured(run: Path, settings: tuple[str, ...], images: int, test_images: int) -> dict[str, Any]:
    """Trains and evaluates a network. Returns the peaks of this process."""
    phases = Phases()
    recipe = load("cifar10/vgg11b-3x-predsim", settings)
    trainer = GreedyTrainer.from_recipe(recipe, run, device="cpu", reporter=phases)
    trainer.fit(noise(images), noise(test_images))
    evaluate(trainer.run, trainer.assemble(), "test", trainer.device)
    return {"stages": phases.stages, "evaluate_bytes": peak_since_last()}


def in_new_process(*arguments: str) -> str:
    """Runs Python with some arguments and returns its output."""
    command = [sys.executable, *arguments]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def summary(peaks: dict[str, Any], bare: int, budget: int) -> dict[str, Any]:
    """Adds the highest peak of each stage and of the whole, and how far they exceed the memory of a
    bare process."""
    for stage in peaks["stages"]:
        stage["beyond_bare_bytes"] = max(stage["resident_bytes"].values()) - bare
        stage["ratio"] = round(stage["beyond_bare_bytes"] / stage["counted_bytes"], 2)
    peak = max(*(bare + s["beyond_bare_bytes"] for s in peaks["stages"]), peaks["evaluate_bytes"])
    whole = {"budget_bytes": budget, "bare_bytes": bare, "peak_bytes": peak}
    limit = budget + ALLOWANCE
    return peaks | whole | {"limit_bytes": limit, "within_limit": peak <= limit}


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@click.option("--multiplier", default=1.0, show_default=True, help="Factor on all channels.")
@click.option("--budget", default="128MiB", show_default=True, help="The memory budget.")
@click.option("--precision", default="float32", show_default=True)
@click.option("--images", default=130, show_default=True, help="Number of training images.")
@click.option("--test-images", default=20, show_default=True)
@click.option("--measure", type=click.Path(path_type=Path), hidden=True)
def main(
    as_json: bool,
    multiplier: float,
    budget: str,
    precision: str,
    images: int,
    test_images: int,
    measure: Path | None,
) -> None:
    """Print the resident memory that training stage by stage takes."""
    if measure:
        settings: tuple[str, ...] = (
            f"model.feature_multiplier={multiplier}",
            f"memory.budget={budget}",
            f"training.precision={precision}",
            "training.epochs=1",
            "store.views=1",
        )
        click.echo(json.dumps(measured(measure, settings, images, test_images)))
        return
    with tempfile.TemporaryDirectory() as directory:
        again = [__file__, *sys.argv[1:], "--measure", f"{directory}/run"]
        peaks_by_stage = json.loads(in_new_process(*again))
    bare = resident("VmRSS", in_new_process("-c", BARE))
    document = summary(peaks_by_stage, bare, parse_size(budget))
    if as_json:
        click.echo(json.dumps(document))
        return
    for stage in document["stages"]:
        peaks = ", ".join(f"{k} {format_size(v)}" for k, v in stage["resident_bytes"].items() if v)
        click.echo(
            f"{stage['stage']} {stage['name']}, {stage['memory_mode']}: counted "
            f"{format_size(stage['counted_bytes'])}; {peaks}; beyond a bare process "
            f"{format_size(stage['beyond_bare_bytes'])}, {stage['ratio']:.2f} times counted"
        )
    for name in ("bare_bytes", "evaluate_bytes", "peak_bytes", "limit_bytes", "within_limit"):
        click.echo(f"{name}: {document[name]}")


if __name__ == "__main__":
    main()
