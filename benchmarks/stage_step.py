"""The time of each stage's step from its store, compared with the machine's peak and with the
published step.

Every stage of VGG8B or VGG11B on CIFAR-10 shapes trains for a few steps as `greedy train` does:
from a store on disk that is read ahead and decoded, with the same loop and step, compiled if a run
over CIFAR-10 would compile it. The published step of all layers at once (`published_step.py`) is
timed in between, in the same process. Times are medians over interleaved rounds. A GPU is waited
for after every step and layer, which makes only our steps slower than in a run.

- `share_of_peak`: the floating-point operations a second of the plain step, as a share of those of
  the fastest product of bfloat16 matrices on the same threads.
- `wait_share`: the share of a step that is spent waiting for its rows.
- `ratio_published_step`: the published step's time for the same layer over ours.
- `epoch_ratio_published_step`: the published step's time over the sum of our stages' times.
- `epoch_ratio_backprop`: with `--backprop`, the time of a step of plain end-to-end back-propagation
  (float32, eager) through the same network over the sum of our stages' times.
"""

import json
import math
import statistics
import tempfile
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from published_step import NETWORKS, EndToEnd, Published, batch

from greedy.base.devices import device_name, pick_device, pick_precision, set_determinism
from greedy.build.modules import build_loss, build_network
from greedy.cache import Store, StoreWriter, fit_encoding, pixel_encoding
from greedy.data import Augmentation
from greedy.forecasts.bench import peak_flops
from greedy.losses import Output
from greedy.memory.choice import Choice, fused_adam
from greedy.memory.peaks import StepDemand
from greedy.models import Shape, cut, shapes
from greedy.recipes import Recipe, load
from greedy.runs.choices import Mode
from greedy.runs.events import Reporter
from greedy.steps.step import Learner
from greedy.steps.strategies import Greedy
from greedy.stores.source import EpochBatches, ImagePreparation, Source
from greedy.training.learners import new_learner, new_optimizer
from greedy.training.loop import Epochs
from greedy.training.resolve import compiles, resolve
from greedy.training.schedule import Milestones

IMAGE: Shape = (3, 32, 32)
CLASSES = 10
BLOCK_VALUES = 2**24  # drawn once and repeated
RUN_ROWS = 50_000  # of the data set whose run decides about compiling


class Clock(Reporter):
    """Records the time of each step but the first, for which reading has to begin."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.steps: list[float] = []

    def epoch_started(self, epoch: int, rows: int) -> None:
        self._last: float | None = None

    def batch_finished(self, rows: int) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        now = time.perf_counter()
        if self._last is not None:
            self.steps.append(now - self._last)
        self._last = now


class Waits(EpochBatches):
    """An epoch that records the seconds spent waiting for each batch but the first."""

    seconds: list[float]

    def __iter__(self) -> Generator[Any]:
        batches = super().__iter__()
        yield next(batches)
        start = time.perf_counter()
        for computed in batches:
            self.seconds.append(time.perf_counter() - start)
            yield computed
            start = time.perf_counter()


@dataclass(frozen=True)
class TimedSource(Source):
    """A source whose waits are noted."""

    seconds: list[float] = field(default_factory=list)

    def epoch_batches(self, *args: Any, **settings: Any) -> EpochBatches:
        found = super().epoch_batches(*args, **settings)
        timed = Waits(found.source, found.loader, found.draws)
        object.__setattr__(timed, "seconds", self.seconds)
        return timed


@dataclass
class Timed:
    """A stage in training, with the times of its steps so far."""

    number: int
    name: str
    flops: int
    learner: Learner
    epochs: Epochs
    clock: Clock
    waits: list[float]

    @property
    def seconds(self) -> float:
        """The median time of a step."""
        return statistics.median(self.clock.steps)

    def train(self) -> None:
        """Trains for an epoch of a few steps."""
        for _ in self.epochs:
            pass

    def warm_up(self) -> None:
        """Trains for an epoch, in which the step is compiled, and drops its times."""
        self.train()
        self.clock.steps.clear()
        self.waits.clear()


def write_store(path: Path, shape: Shape, rows: int, *, raw: bool) -> Store:
    """Writes and opens a store of random images if ``raw``, else of activations like those of a
    trained stage: leaky ReLU of normal numbers."""
    random = np.random.default_rng(0)
    block = (min(rows, max(1, BLOCK_VALUES // math.prod(shape))), *shape)
    values: np.ndarray
    if raw:
        values, encoding = random.integers(0, 256, block, np.uint8), pixel_encoding(shape)
    else:
        values = random.standard_normal(block, dtype=np.float32)
        values = np.where(values > 0, values, np.float32(0.01) * values)
        encoding = fit_encoding("uint8", values)
    with StoreWriter(
        path,
        rows=rows,
        views=1,
        encoding=encoding,
        compressor="lz4",
        labels=random.integers(0, CLASSES, rows),
        index=np.arange(rows),
        encoded=raw,
    ) as writer:
        for start in range(0, rows, len(values)):
            writer.append(values[: rows - start])
    return Store(path)


def stages(
    recipe: Recipe,
    precision: str,
    steps: int,
    device: torch.device,
    directory: Path,
    numbers: Sequence[int],
    *,
    graphs: bool,
) -> Iterator[Timed]:
    """Yields the stages ``numbers`` of the recipe's network, by default all, each with its
    store."""
    network = cut(build_network(recipe.model, IMAGE, CLASSES))
    size = recipe.training.batch_size
    once = recipe.training.model_copy(update={"epochs": 1})
    for stage, shape in zip(network, shapes(network, IMAGE), strict=True):
        if numbers and stage.number not in numbers:
            continue
        is_output = stage is network[-1]
        hidden = build_loss(recipe.loss)
        loss = Output(hidden.output_scale) if is_output else hidden
        flops = StepDemand(
            stage, shape, loss, CLASSES, size, precision, fused_adam, device.type, 0
        ).flops()
        plain = Choice(Mode.PLAIN, size, 0)
        compiled = compiles(recipe, stage.number, shape.hidden, RUN_ROWS, plain, device)
        path = directory / f"stage{stage.number - 1}"
        first = stage.number == 1
        rows = {"train": size * (steps + 1), "test": 2}  # the test split is not what is timed
        stores = {k: write_store(path / k, shape.input, n, raw=first) for k, n in rows.items()}
        augmentation = Augmentation.parse("crop4+hflip")
        images = ImagePreparation([0.4] * 3, [0.3] * 3, augmentation) if first else None
        source = TimedSource(stage.number - 1, path, stores, device, 0, images)
        choices = resolve(
            recipe,
            stores["train"],
            1,
            plain,
            device,
            compiled=compiled,
            hidden=shape.hidden,
        )
        learner = new_learner(stage, shape, loss, CLASSES, recipe, choices, device, zero=is_output)
        learner.graph_rows = learner.graph_rows if graphs else 0
        learner.optimizer = new_optimizer(learner.parameters(), recipe, stage.number, None)
        clock = Clock(device)
        epochs = Epochs(
            Greedy(learner),
            source,
            [shape.input],
            Milestones(5e-4, 0.25, []),
            recipe.model_copy(update={"training": once}),
            clock,
            ample_memory=True,
        )
        name = "output" if is_output else stage.name
        yield Timed(stage.number, name, flops, learner, epochs, clock, source.seconds)


def measure(
    recipe: Recipe,
    precision: str,
    steps: int,
    rounds: int,
    device: torch.device,
    numbers: Sequence[int] = (),
    *,
    graphs: bool = True,
    backprop: bool = False,
) -> dict[str, Any]:
    """Measures all stages and returns the document to print."""
    size = recipe.training.batch_size
    set_determinism(device, False)
    with device:
        what = (recipe.model.feature_multiplier, recipe.model.network)
        published, whole = Published(*what), EndToEnd(*what) if backprop else None
        images_and_labels = batch(size)
    published_times: list[list[float]] = []
    peaks, backprop_times = [], []
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        timed = list(stages(recipe, precision, steps, device, place, numbers, graphs=graphs))
        published.step(*images_and_labels)
        if whole:
            whole.whole_step(*images_and_labels)
        for _ in range(2):  # compiling a stage for the first time drops what was compiled before
            for stage in timed:
                stage.warm_up()
        for _ in range(rounds):
            peaks.append(peak_flops(device))
            published_times.append(published.step(*images_and_labels))
            if whole:
                backprop_times.append(whole.whole_step(*images_and_labels))
            for stage in timed:
                stage.train()
    peak = statistics.median(peaks)
    layers = [statistics.median(seconds) for seconds in zip(*published_times, strict=True)]
    published_seconds = statistics.median(map(sum, published_times))
    stage_seconds = sum(stage.seconds for stage in timed)
    document = {
        "network": recipe.model.network,
        "device": device_name(device),
        "multiplier": recipe.model.feature_multiplier,
        "precision": precision,
        "threads": torch.get_num_threads(),
        "peak_gflops": round(peak / 1e9, 1),
        "published_images_per_second": round(size / published_seconds, 2),
        "stages": [
            {
                "stage": stage.number,
                "name": stage.name,
                "compiled": bool(stage.learner.compiled_rows),
                "graphs": bool(stage.learner.graph_rows),
                "images_per_second": round(size / stage.seconds, 1),
                "share_of_peak": round(stage.flops / stage.seconds / peak, 3),
                "wait_share": round(statistics.median(stage.waits) / stage.seconds, 4),
                "ratio_published_step": round(layers[stage.number - 1] / stage.seconds, 2),
            }
            for stage in timed
        ],
    }
    if not numbers:
        document["epoch_ratio_published_step"] = round(published_seconds / stage_seconds, 2)
    if whole:
        backprop_seconds = statistics.median(backprop_times)
        document["backprop_images_per_second"] = round(size / backprop_seconds, 2)
        if not numbers:
            document["epoch_ratio_backprop"] = round(backprop_seconds / stage_seconds, 2)
    return document


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@click.option("--network", type=click.Choice(list(NETWORKS)), default="vgg8b", show_default=True)
@click.option("--device", "place", default="cpu", show_default=True, help="cpu or cuda.")
@click.option("--multiplier", default=0.5, show_default=True, help="Factor on all channels.")
@click.option("--precision", default="auto", show_default=True)
@click.option("--compile", "compiling", default="auto", show_default=True)
@click.option("--graphs/--no-graphs", default=True, help="Launch steps as CUDA graphs.")
@click.option("--stages", default="", help="Numbers of the stages to time  [default: all].")
@click.option("--backprop", is_flag=True, help="Time end-to-end back-propagation too.")
@click.option("--rows", default=128, show_default=True, help="Rows in a batch.")
@click.option("--steps", default=2, show_default=True, help="Steps of a stage in a round.")
@click.option("--rounds", default=3, show_default=True)
def main(
    as_json: bool,
    network: str,
    place: str,
    multiplier: float,
    precision: str,
    compiling: str,
    graphs: bool,
    stages: str,
    backprop: bool,
    rows: int,
    steps: int,
    rounds: int,
) -> None:
    """Time the step of every stage."""
    recipe = load(
        f"cifar10/{network}-predsim",
        [
            f"model.feature_multiplier={multiplier}",
            f"training.batch_size={rows}",
            f"training.compile={compiling}",
            f"training.precision={precision}",
        ],
    )
    device = pick_device(place)
    numbers = [int(number) for number in stages.split(",") if number]
    settings = (recipe, pick_precision(precision, device), steps, rounds, device, numbers)
    document = measure(*settings, graphs=graphs, backprop=backprop)
    if as_json:
        click.echo(json.dumps(document))
        return
    click.echo(
        f"{network}({multiplier:g}x), batch {rows}, {document['device']}, "
        f"{document['precision']}, {document['threads']} threads: peak "
        f"{document['peak_gflops']:,.0f} GFLOP/s, published step "
        f"{document['published_images_per_second']:,.1f} images/s"
    )
    for row in document["stages"]:
        click.echo(
            f"{row['stage']} {row['name']}: {row['images_per_second']:,.0f} images/s, "
            f"{row['share_of_peak']:.0%} of the peak, waits {row['wait_share']:.1%}, "
            f"{row['ratio_published_step']:.2f} times the published step"
        )
    for name in ("published_step", "backprop"):
        if (ratio := document.get(f"epoch_ratio_{name}")) is not None:
            click.echo(f"all stages: {ratio:.2f} times an epoch of {name}")


if __name__ == "__main__":
    main()
