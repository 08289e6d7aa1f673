"""What a run will take, told before anything runs: memory, disk and operations of each stage.

Neither data nor a GPU is touched, and nothing is written. The figures of memory are counted on
fake tensors, those of the disk are the estimates that the run itself plans with.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from greedy.build import build_loss, build_network, checked_shapes
from greedy.data import DATASETS, load_dataset
from greedy.devices import pick_device, pick_precision
from greedy.disk import Plan
from greedy.errors import UserError
from greedy.losses import Glob, LocalLoss, Output
from greedy.memory.baselines import baselines, choose_network
from greedy.memory.choice import Choice, choose, fused_adam, memory_budget, stored_row_bytes
from greedy.memory.peaks import StepDemand
from greedy.models import Shape, Stage, StageShapes, cut
from greedy.planning import plan_disk
from greedy.recipes import Recipe
from greedy.runs import SPLITS, RunDirectory
from greedy.training.parts import parts_of
from greedy.training.resolve import for_stage
from greedy.training.strategies import losses_of


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
        seconds: ``None`` as long as nobody has measured how fast this machine is.
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
    """What a run will take, and what its network would take by other means."""

    stages: Sequence[StageForecast]
    disk: Plan
    baselines: Mapping[str, int]

    @property
    def peak_memory_bytes(self) -> int:
        """Of the stage that takes most."""
        return max(stage.peak_memory_bytes for stage in self.stages)


def data_facts(run: RunDirectory, allow_function: bool = False) -> DataFacts:
    """What is known of the run's data set without reading it: from stage 0 where that is written,
    else from its name. Of an image folder the files are listed and one header is read; a
    function ``module:function`` is called only if ``allow_function`` is true.

    Raises ``UserError`` where shape, rows or classes cannot be known.
    """
    if run.record(0) is not None:
        data = run.complete(0)
        assert data.store is not None
        return DataFacts(
            data.row_shape, len(data.class_names), dict(data.rows.items()), data.store.bytes
        )
    name, image_size = run.recipe.data.name, run.recipe.data.image_size
    entry = next((entry for entry in DATASETS if entry.name == name), None)
    if entry is not None and image_size is None:
        rows = {"train": entry.train, "test": entry.test}
        return _unwritten(entry.shape, entry.classes, rows, value_bytes=1)
    dataset = load_dataset(name, image_size=image_size, allow_function=allow_function)
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
    """The machine for ``--device``, with the recipe's budget. A GPU need not be there: its
    precision, if the recipe leaves it open, is then float32, and an open budget is none."""
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
    run: RunDirectory, data: DataFacts, machine: Machine, model: nn.Sequential | None = None
) -> Forecast:
    """What a run will take whose directory may be yet to be made. ``model`` only where the
    recipe's network is ``python``.

    Raises ``UserError`` for what could not be trained as asked, and for a budget that a stage
    cannot meet.
    """
    recipe = run.recipe
    stages = cut(model or build_network(recipe.model, data.shape, data.classes))
    shapes = checked_shapes(recipe, stages, data.shape, data.classes)
    disk = plan_disk(run, shapes, data.rows, data.stored_bytes)
    loss = build_loss(recipe.loss)
    planned = _Planned(recipe, data, machine, stages, shapes, disk, loss)
    numbers = range(1, len(stages) + 1)
    if recipe.training.strategy == "greedy":
        found = [planned.forecast(number) for number in numbers]
    else:
        choice = planned.network()
        found = [planned.share(number, choice) for number in numbers]
    others = baselines(stages, shapes, loss, data.classes, recipe.training.batch_size)
    return Forecast(found, disk, others)


@dataclass(frozen=True)
class _Planned:
    """A run as far as it is known before it begins."""

    recipe: Recipe
    data: DataFacts
    machine: Machine
    stages: Sequence[Stage]
    shapes: Sequence[StageShapes]
    disk: Plan
    loss: LocalLoss
    counted: dict[Any, tuple[Choice, int]] = field(default_factory=dict)

    def forecast(self, number: int) -> StageForecast:
        stage, shape = self.stages[number - 1], self.shapes[number - 1]
        is_output = number == len(self.stages)
        loss = Output(self.loss.output_scale) if is_output else self.loss
        source = self._source(number)
        choice, flops = self._counted(stage, shape, loss, self._budget(source, number))
        with torch.device("meta"):
            heads = loss.heads(shape.hidden, self.data.classes)
        rows = self._rows_trained() * for_stage(self.recipe.training.epochs, number)
        replayed = sum(each.operations for each in self.shapes[source : number - 1])
        return StageForecast(
            stage=number,
            name="output" if is_output else stage.name,
            mode=choice.mode,
            micro_batch=choice.micro_batch,
            usual=parts_of(stage, heads) is not None,
            peak_memory_bytes=choice.peak_bytes,
            parameters=sum(p.numel() for p in (*stage.parameters(), *heads.parameters())),
            store_bytes=0 if is_output else self.disk.stages[number - 1].bytes,
            flops=flops * rows // self.recipe.training.batch_size,
            replay_flops=2 * replayed * rows,
        )

    def network(self) -> Choice:
        """The choice for a step of all stages at once."""
        machine = self.machine
        return choose_network(
            self.stages,
            self.shapes,
            self.loss,
            self.data.classes,
            self.recipe.training,
            machine.precision,
            machine.memory_budget_bytes,
            machine.device,
            fused_adam if machine.optimizer_state == "device" else None,
        )

    def share(self, number: int, choice: Choice) -> StageForecast:
        """A stage's share of training all at once; the memory is that of the whole."""
        stage, shape = self.stages[number - 1], self.shapes[number - 1]
        training, count = self.recipe.training, len(self.stages)
        loss = losses_of(training.strategy, self.loss, count)[number - 1]
        with torch.device("meta"):
            heads = loss.heads(shape.hidden, self.data.classes)
        flops = 4 * training.batch_size * shape.operations
        if not isinstance(loss, Glob):
            _, flops = self._counted(stage, shape, loss, None)
        if training.strategy != "joint" and number > 1:  # the gradient of the stage's input
            flops += 2 * training.batch_size * shape.operations
        rows = self._rows_trained() * for_stage(training.epochs, number)
        return StageForecast(
            stage=number,
            name="output" if number == count else stage.name,
            mode=choice.mode,
            micro_batch=choice.micro_batch,
            usual=True,
            peak_memory_bytes=choice.peak_bytes,
            parameters=sum(p.numel() for p in (*stage.parameters(), *heads.parameters())),
            store_bytes=0,
            flops=flops * rows // training.batch_size,
            replay_flops=0,
        )

    def _source(self, number: int) -> int:
        """The stage whose store a stage trains from."""
        earlier = self.disk.stages[: number - 1]
        return max((stage.number for stage in earlier if stage.views != "live"), default=0)

    def _budget(self, source: int, number: int) -> int | None:
        """What the frozen stages that are replayed leave of it."""
        if self.machine.memory_budget_bytes is None:
            return None
        replayed = self.stages[source : number - 1]
        weights = (p.numel() * p.element_size() for s in replayed for p in s.parameters())
        return self.machine.memory_budget_bytes - sum(weights)

    def _counted(
        self, stage: Stage, shape: StageShapes, loss: LocalLoss, budget: int | None
    ) -> tuple[Choice, int]:
        """The choice for a stage and the operations of its plain step. Networks repeat
        themselves, and of stages that are alike one is counted."""
        row_bytes = stored_row_bytes(stage.number, shape, self.recipe)
        sizes = tuple(p.shape for p in stage.parameters())
        alike = (repr(stage), stage.flatten, stage.dropout, sizes, shape, loss, row_bytes, budget)
        if alike not in self.counted:
            batch_size, machine = self.recipe.training.batch_size, self.machine
            what = (stage, shape, loss, self.data.classes, batch_size, machine.precision)
            plain = StepDemand(*what, fused_adam, machine.device, row_bytes)
            choice = choose(*what, row_bytes, budget, machine.optimizer_state, machine.device)
            self.counted[alike] = choice, plain.flops()
        return self.counted[alike]

    def _rows_trained(self) -> int:
        """Of the training rows those that take part in an epoch."""
        rows = self.data.rows["train"]
        if not self.recipe.training.patience:
            return rows
        return rows - max(1, round(self.recipe.data.holdout * rows))
