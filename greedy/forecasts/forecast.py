"""What a run will take, told before anything runs: memory, disk and operations of each stage.

Neither data nor a GPU is touched, and nothing is written. The figures of memory are counted on
fake tensors, those of the disk are the estimates that the run itself plans with.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from greedy.base.devices import pick_device, pick_precision
from greedy.base.errors import UserError
from greedy.build.cut_network import CutNetwork
from greedy.build.modules import build_loss, build_network
from greedy.data import DATASETS, Reading, load_dataset
from greedy.forecasts.calibration import Calibration, Work
from greedy.forecasts.duration import Durations
from greedy.memory.baselines import baselines
from greedy.memory.choice import Choice, memory_budget
from greedy.memory.plan import MemoryPlan
from greedy.memory.resident import resident
from greedy.models import Shape
from greedy.recipes import Recipe
from greedy.recipes.per_stage import for_stage
from greedy.runs.directory import SPLITS, RunDirectory
from greedy.runs.disk_budget import plan_disk
from greedy.runs.disk_plan import DiskPlan
from greedy.runs.state import RunState
from greedy.steps.parts import parts_of


@dataclass(frozen=True)
class DataFacts:
    """A data set as a forecast sees it.

    Attributes:
        shape: (C, H, W) of an image.
        classes: how many.
        rows: of each split.
        stored_bytes: of stage 0 on disk, at most.
    """

    shape: Shape
    classes: int
    rows: Mapping[str, int]
    stored_bytes: int


@dataclass(frozen=True)
class Machine:
    """What a run computes with.

    Attributes:
        device: ``cpu``, ``cuda`` or ``mps``.
        precision: ``float32``, ``bfloat16`` or ``float16``.
        memory_budget_bytes: what a step may take on the device; ``None`` for anything.
        optimizer_state: ``device`` or ``host``, where Adam's moments are.
    """

    device: str
    precision: str
    memory_budget_bytes: int | None
    optimizer_state: str


@dataclass(frozen=True)
class StageForecast:
    """What one stage will take.

    Attributes:
        mode, micro_batch: the memory mode of its step and the rows of its micro-batches.
        usual: whether the stage is of the usual pattern; others train in the plain mode alone.
        peak_memory_bytes: in a step, counted.
        parameters: of encoder and heads.
        store_bytes: of its store, 0 if it has none.
        flops: floating-point operations of the plain step over all epochs, a multiply-add
            counting 2.
        replay_flops: of the frozen stages between its source and it, likewise.
        seconds: from its first step to its finished store, see ``greedy.forecasts.duration``;
            ``None`` as long as nobody has measured how fast this machine is.
    """

    stage: int
    name: str
    mode: str
    micro_batch: int
    usual: bool
    peak_memory_bytes: int
    parameters: int
    store_bytes: int
    flops: int
    replay_flops: int
    seconds: float | None = None


@dataclass(frozen=True)
class Forecast:
    """What a run will take, and what its network would take by other means.

    Attributes:
        resident_bytes: of the whole process that trains it on a CPU, about; ``None`` elsewhere.
    """

    stages: Sequence[StageForecast]
    disk: DiskPlan
    baselines: Mapping[str, int]
    resident_bytes: int | None = None

    @property
    def peak_memory_bytes(self) -> int:
        """The peak of the stage that takes most."""
        return max(stage.peak_memory_bytes for stage in self.stages)

    @property
    def seconds(self) -> float | None:
        """Seconds of all stages; ``None`` if that of one is not known."""
        known = [stage.seconds for stage in self.stages if stage.seconds is not None]
        return sum(known) if len(known) == len(self.stages) else None


def data_facts(run: RunDirectory, allow_function: bool = False) -> DataFacts:
    """Returns what is known of the run's data set without reading it: from stage 0 where that is
    written, else from its name. Of an image folder the files are listed and one header is read; a
    function ``module:function`` is called only if ``allow_function`` is true.

    Raises ``UserError`` where shape, rows or classes cannot be known.
    """
    state = RunState.read(run)
    if state.record(0) is not None:
        data = state.complete_record(0)
        assert data.store is not None
        return DataFacts(
            data.row_shape, len(data.class_names), dict(data.rows.items()), data.store.bytes
        )
    return named_data_facts(run.recipe, allow_function)


def named_data_facts(recipe: Recipe, allow_function: bool = False) -> DataFacts:
    """Returns the facts of a data set that is known by its name only."""
    name, image_size = recipe.data.name, recipe.data.image_size
    entry = next((entry for entry in DATASETS if entry.name == name), None)
    if entry is not None and image_size is None:
        rows = {"train": entry.train, "test": entry.test}
        return _unwritten(entry.shape, entry.classes, rows, value_bytes=1)
    dataset = load_dataset(
        name,
        image_size=image_size,
        allow_function=allow_function,
        reading=Reading.of(recipe.data),
    )
    if dataset.class_names is None:
        raise UserError(
            f"how many classes {name} has is not known before its labels are read: give the "
            f"training set an attribute `classes` with their names"
        )
    rows = {split: len(getattr(dataset, split)) for split in SPLITS}
    itemsize = dataset.train.dtype.itemsize
    return _unwritten(dataset.train.shape, len(dataset.class_names), rows, itemsize)


def _unwritten(shape: Shape, classes: int, rows: Mapping[str, int], value_bytes: int) -> DataFacts:
    return DataFacts(shape, classes, rows, sum(rows.values()) * math.prod(shape) * value_bytes)


def machine(recipe: Recipe, device: str) -> Machine:
    """Describes the machine for ``--device``, with the recipe's budget. A GPU need not be there: a
    precision that the recipe leaves open is then float32, and an open budget is none."""
    absent = device == "cuda" and not torch.cuda.is_available()
    place = torch.device(device) if absent else pick_device(device)
    precision, budget = recipe.training.precision, recipe.memory.budget
    return Machine(
        device=place.type,
        precision="float32" if absent and precision == "auto" else pick_precision(precision, place),
        memory_budget_bytes=None if absent and budget == "auto" else memory_budget(recipe, place),
        optimizer_state=recipe.memory.optimizer_state,
    )


def forecast(
    run: RunDirectory,
    data: DataFacts,
    machine: Machine,
    model: nn.Sequential | None = None,
    calibration: Calibration | None = None,
) -> Forecast:
    """Forecasts a run, whose directory need not exist. ``model`` only where the recipe's network is
    ``python``; with a ``calibration`` of the machine, times are forecast too.

    Raises ``UserError`` for a recipe that cannot be trained as asked, and for a budget that a stage
    cannot meet.
    """
    recipe = run.recipe
    network = CutNetwork.of(
        recipe,
        model or build_network(recipe.model, data.shape, data.classes),
        data.shape,
        data.classes,
        build_loss(recipe.loss),
    )
    disk = plan_disk(RunState.read(run), network.shapes, data.rows, data.stored_bytes)
    memory = MemoryPlan(
        recipe,
        network,
        machine.precision,
        machine.memory_budget_bytes,
        machine.device,
    )
    planned = _Planned(recipe, data, memory, disk)
    at_once = None if recipe.training.strategy == "greedy" else memory.at_once()
    found = [planned.forecast(number, at_once) for number in range(1, len(network) + 1)]
    if calibration is not None and at_once is None:
        found = planned.timed(found, calibration)
    others = baselines(network, recipe.training.batch_size)
    process = None
    if machine.device == "cpu":  # now that counting has brought in the modules that training needs
        process = resident(max(each.peak_memory_bytes for each in found))
    return Forecast(found, disk, others, process)


@dataclass(frozen=True)
class _Planned:
    """A run as far as it is known before it begins."""

    recipe: Recipe
    data: DataFacts
    memory: MemoryPlan
    disk: DiskPlan

    def forecast(self, number: int, at_once: Choice | None) -> StageForecast:
        """Forecasts a stage that trains alone or, given the choice ``at_once`` of the whole
        network, its share of that."""
        network = self.memory.network
        stage, shape = network.stages[number - 1], network.shapes[number - 1]
        is_output = number == len(network)
        source = number - 1 if at_once else self.disk.source(number)
        choice = at_once or self.memory.stage(number, source)
        with torch.device("meta"):
            heads = self.memory.loss_of(number).heads(shape.hidden, self.data.classes)
        rows = self._rows_trained() * for_stage(self.recipe.training.epochs, number)
        replayed = sum(each.operations for each in network.shapes[source : number - 1])
        stored = at_once is None and not is_output
        return StageForecast(
            stage=number,
            name=network.name(number),
            mode=choice.mode,
            micro_batch=choice.micro_batch,
            usual=at_once is not None or parts_of(stage, heads, shape.hidden) is not None,
            peak_memory_bytes=choice.peak_bytes,
            parameters=sum(p.numel() for p in (*stage.parameters(), *heads.parameters())),
            store_bytes=self.disk.stages[number - 1].bytes if stored else 0,
            flops=self.memory.flops(number) * rows // self.recipe.training.batch_size,
            replay_flops=2 * replayed * rows,
        )

    def timed(self, found: list[StageForecast], calibration: Calibration) -> list[StageForecast]:
        """Adds their seconds to the forecasts."""
        held_out = self.data.rows["train"] - self._rows_trained()
        work = [self._work(each.stage) for each in found]
        durations = Durations(self.recipe, self.disk, self.data.rows, held_out, work)
        return [
            replace(each, seconds=durations.seconds(calibration, n, self.disk.source(n)))
            for n, each in enumerate(found, start=1)
        ]

    def _work(self, number: int) -> Work:
        memory = self.memory
        return Work.of(
            memory.network.stages[number - 1],
            memory.network.shapes[number - 1],
            memory.precision,
            memory.stage(number, self.disk.source(number)),
            memory.flops(number),
            self.recipe.training.batch_size,
        )

    def _rows_trained(self) -> int:
        """The number of training rows that take part in an epoch."""
        rows = self.data.rows["train"]
        return rows - self.recipe.held_out(rows)
