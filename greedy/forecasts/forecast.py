"""Forecasts of the memory, disk, operations and time of each stage, before anything runs.

Neither data nor a GPU is touched, and nothing is written. The figures of memory are counted on
fake tensors, those of the disk are the estimates that the run itself plans with.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from greedy.base.errors import UserError
from greedy.build.cut_network import CutNetwork
from greedy.build.modules import build_loss, build_network
from greedy.data import DATASETS, Reading, draws_at_random, load_dataset
from greedy.data.folder import CHANNELS
from greedy.data.loading import folder_of
from greedy.forecasts.duration import Durations
from greedy.forecasts.machine import Machine
from greedy.memory.baselines import baselines
from greedy.memory.choice import Choice
from greedy.memory.plan import MemoryPlan, StageStores
from greedy.memory.resident import resident
from greedy.models import Shape
from greedy.recipes import Recipe
from greedy.recipes.per_stage import for_stage
from greedy.runs.directory import SPLITS, RunDirectory
from greedy.runs.disk_budget import plan_disk
from greedy.runs.disk_plan import DiskPlan
from greedy.runs.plan_basis import PlanBasis
from greedy.runs.state import RunState
from greedy.runs.views import Views, views_drawn
from greedy.steps.optimizers import factory
from greedy.training.calibration import Calibration, Work, byte_operations, calibration_of
from greedy.training.images import LABEL_AND_INDEX


@dataclass(frozen=True)
class DataFacts:
    """The facts about a data set that a forecast needs.

    Attributes:
        shape: (C, H, W) of an image.
        classes: number of classes.
        rows: number of rows of each split.
        stored_bytes: bytes of stage 0 on disk at most.
        fresh: whether images are read from the data set for every view and live epoch.
    """

    shape: Shape
    classes: int
    rows: Mapping[str, int]
    stored_bytes: int
    fresh: bool = False


@dataclass(frozen=True)
class StageForecast:
    """The forecast of one stage.

    Attributes:
        stage: its number.
        name: its name.
        mode: the memory mode of its step.
        micro_batch: rows computed at a time in a step.
        why_plain: why the stage has no memory mode but ``plain``; empty if it has all.
        peak_memory_bytes: counted bytes of a step at most.
        parameters: number of parameters of encoder and heads.
        store_bytes: bytes of its store, 0 if it has none.
        flops: floating-point operations of the plain step over all epochs, two for a multiply-add.
        replay_flops: those of the frozen stages between its source and it.
        drawing_flops: those of drawing new views of its source.
        drawing_bytes: counted bytes of doing so beside its steps at most; 0 if they take turns.
        views: of its store, ``live`` if it has none.
        reuse: epochs after which a view of its store is replaced, 0 for never.
        bytes_written: into its store, also for views that are replaced.
        seconds: from its first step to its finished store, see ``greedy.forecasts.duration``;
            ``None`` if the speed of this machine is not known.
    """

    stage: int
    name: str
    mode: str
    micro_batch: int
    why_plain: str
    peak_memory_bytes: int
    parameters: int
    store_bytes: int
    flops: int
    replay_flops: int
    drawing_flops: int
    views: Views
    reuse: int
    bytes_written: int
    drawing_bytes: int = 0
    seconds: float | None = None

    @property
    def drawing_share(self) -> float:
        """The share of the stage's operations that draw views."""
        return self.drawing_flops / (self.flops + self.replay_flops + self.drawing_flops)


@dataclass(frozen=True)
class Forecast:
    """The forecast of a run.

    Attributes:
        stages: the forecasts of its stages, in order.
        disk: the plan of its stores.
        baselines: peak memory in bytes of a step by other ways of training, named as in
            ``greedy.memory.baselines.BASELINES``.
        resident_bytes: estimated bytes of the whole process on a CPU; ``None`` on other devices.
    """

    stages: Sequence[StageForecast]
    disk: DiskPlan
    baselines: Mapping[str, int]
    resident_bytes: int | None = None

    @property
    def peak_memory_bytes(self) -> int:
        """The bytes of the stage whose step takes most."""
        return max(stage.peak_memory_bytes for stage in self.stages)

    @property
    def drawing_bytes(self) -> int:
        """The most bytes that drawing views takes beside a step."""
        return max(stage.drawing_bytes for stage in self.stages)

    @property
    def bytes_written(self) -> int:
        """The bytes that are written into all stores, also for views that are replaced."""
        return sum(stage.bytes_written for stage in self.stages)

    @property
    def drawing_share(self) -> float:
        """The share of all operations that draw views."""
        drawn = sum(stage.drawing_flops for stage in self.stages)
        return drawn / sum(s.flops + s.replay_flops + s.drawing_flops for s in self.stages)

    @property
    def seconds(self) -> float | None:
        """The seconds of all stages; ``None`` if those of one are not known."""
        known = [stage.seconds for stage in self.stages if stage.seconds is not None]
        return sum(known) if len(known) == len(self.stages) else None


def data_facts(
    run: RunDirectory, allow_function: bool = False, stated: DataFacts | None = None
) -> DataFacts:
    """Returns the facts about a run's data set: from stage 0 if that is written, else those
    ``stated``, or as ``named_data_facts`` does.

    Raises:
        UserError: shape, rows or classes are not known, or are stated of a run that has its images.
    """
    state = RunState.read(run)
    if state.record(0) is not None:
        if stated is not None:
            raise UserError(f"{run.path} has its images: leave out --images and --classes")
        data = state.complete_record(0)
        assert data.store is not None
        return DataFacts(
            data.row_shape,
            len(data.class_names),
            dict(data.rows.items()),
            data.store.bytes,
            data.data_choices.fresh,
        )
    return stated or named_data_facts(run.recipe, allow_function)


def named_data_facts(recipe: Recipe, allow_function: bool = False) -> DataFacts:
    """Returns the facts about a recipe's data set without reading it: from the list of data sets,
    or from the files of an image folder and the header of one of them. A function
    ``module:function`` is called only if ``allow_function`` is true.

    Raises:
        UserError: shape, rows or classes are not known.
    """
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
    facts = _unwritten(dataset.train.shape, len(dataset.class_names), rows, itemsize)
    fresh = draws_at_random(dataset) and recipe.data.transforms == "fresh"
    return replace(facts, fresh=fresh)


def stated_data_facts(
    recipe: Recipe, images: tuple[int, int] | None, classes: int | None
) -> DataFacts | None:
    """Returns the facts about an image folder that is not on this machine; ``None`` if none are
    stated.

    Args:
        recipe: whose data set the folder is, and which says to which size images are brought.
        images: numbers of training and test images, of 8 bits.
        classes: number of classes.

    Raises:
        UserError: only one of the two is stated, or the data set is no folder or has no image size.
    """
    if images is None and classes is None:
        return None
    if images is None or classes is None:
        raise UserError("a folder that is not here is stated as --images TRAIN TEST --classes N")
    name, side = recipe.data.name, recipe.data.image_size
    if folder_of(name) is None:
        raise UserError(
            f"--images and --classes are for folder:PATH alone: leave them out for {name}"
        )
    if side is None:
        raise UserError("the size of images that are not here is not known: set data.image_size")
    return _unwritten((CHANNELS, side, side), classes, dict(zip(SPLITS, images, strict=True)), 1)


def _unwritten(shape: Shape, classes: int, rows: Mapping[str, int], value_bytes: int) -> DataFacts:
    row_bytes = math.prod(shape) * value_bytes + LABEL_AND_INDEX
    return DataFacts(shape, classes, rows, sum(rows.values()) * row_bytes)


def forecast(
    run: RunDirectory,
    data: DataFacts,
    machine: Machine,
    model: nn.Module | None = None,
    calibration: Calibration | None = None,
) -> Forecast:
    """Forecasts a run.

    Args:
        run: the run directory, which need not exist.
        data: the facts about its data set.
        machine: the device and its settings.
        model: the network, only if the recipe's is ``python`` or what a function returns.
        calibration: the measured speed of the machine; without it times are not known.

    Raises:
        UserError: the recipe cannot be trained as asked, or a budget is too small.
    """
    recipe = run.recipe
    network = CutNetwork.of(
        recipe,
        model or build_network(recipe.model, data.shape, data.classes),
        data.shape,
        data.classes,
        build_loss(recipe.loss),
    )
    disk = plan_disk(
        RunState.read(run),
        network.shapes,
        data.rows,
        data.stored_bytes,
        PlanBasis.of_run(run, byte_operations(machine.device, calibration)),
        fresh=data.fresh,
    )
    memory = MemoryPlan(
        recipe,
        network,
        machine.precision,
        machine.memory_budget_bytes,
        machine.device,
        processes=machine.processes,
        drawing=machine.drawing,
    )
    planned = _Planned(recipe, data, memory, disk)
    at_once = None if recipe.training.strategy == "greedy" else memory.at_once()
    stages = [planned.forecast(number, at_once) for number in range(1, len(network) + 1)]
    if calibration is not None and at_once is None:
        stages = planned.timed(stages, calibration)
    others = baselines(network, recipe.training.batch_size, factory(recipe.training))
    process = None
    if machine.device == "cpu":  # after counting, which has imported what training needs
        drawing = machine.drawing is not None and machine.drawing.type == "cpu"
        counted = max(s.peak_memory_bytes + drawing * s.drawing_bytes for s in stages)
        process = resident(counted, machine.precision)
    return Forecast(stages, disk, others, process)


@dataclass(frozen=True)
class _Planned:
    """The plans of a run before it begins."""

    recipe: Recipe
    data: DataFacts
    memory: MemoryPlan
    disk: DiskPlan

    def forecast(self, number: int, at_once: Choice | None) -> StageForecast:
        """Forecasts a stage without its time. ``at_once`` is the choice for the whole network, if
        all stages train at once."""
        network = self.memory.network
        stage, shape = network.stages[number - 1], network.shapes[number - 1]
        is_output = number == len(network)
        source = number - 1 if at_once else self.disk.source(number)
        choice = at_once or self.memory.stage(number, StageStores.planned(self.disk, number))
        with torch.device("meta"):
            heads = self.memory.loss_of(number).heads(shape.hidden, self.data.classes)
        rows = self._rows_trained() * for_stage(self.recipe.training.epochs, number)
        replayed = sum(shapes.operations for shapes in network.shapes[source : number - 1])
        store = None if at_once or is_output else self.disk.stages[number - 1]
        return StageForecast(
            stage=number,
            name=network.name(number),
            mode=choice.mode,
            micro_batch=choice.micro_batch,
            why_plain="" if at_once else self.memory.why_plain(number),
            peak_memory_bytes=choice.peak_bytes,
            parameters=sum(p.numel() for p in (*stage.parameters(), *heads.parameters())),
            store_bytes=store.bytes if store else 0,
            flops=self.memory.flops(number) * rows // self.recipe.training.batch_size,
            replay_flops=2 * replayed * rows,
            drawing_flops=0 if at_once else self._drawing_flops(number, source),
            drawing_bytes=choice.drawing_bytes,
            views=store.views if store else "live",
            reuse=store.reuse if store else 0,
            bytes_written=store.bytes_written if store else 0,
        )

    def _drawing_flops(self, number: int, source: int) -> int:
        """Returns the operations of drawing the source's views while the stage trains."""
        epochs = for_stage(self.recipe.training.epochs, number)
        drawn = views_drawn(epochs, self.disk.reuse(source)) * self.data.rows["train"]
        return 2 * drawn * sum(shapes.operations for shapes in self.memory.network.shapes[:source])

    def timed(self, stages: list[StageForecast], calibration: Calibration) -> list[StageForecast]:
        """Returns the forecasts with their times."""
        held_out = self.data.rows["train"] - self._rows_trained()
        work = [self._work(stage.stage) for stage in stages]
        device = self.memory.drawing
        apart = device is not None and device.apart
        durations = Durations(
            self.recipe,
            self.disk,
            self.data.rows,
            held_out,
            work,
            apart,
            calibration_of(device.type) if device else None,
        )
        return [
            replace(stage, seconds=durations.seconds(calibration, n, self.disk.source(n)))
            for n, stage in enumerate(stages, start=1)
        ]

    def _work(self, number: int) -> Work:
        memory = self.memory
        return Work.of(
            memory.network.stages[number - 1],
            memory.network.shapes[number - 1],
            memory.precision,
            memory.stage(number, StageStores.planned(self.disk, number)),
            memory.flops(number),
            self.recipe.training.batch_size,
        )

    def _rows_trained(self) -> int:
        """Returns the number of training rows in an epoch."""
        rows = self.data.rows["train"]
        return rows - self.recipe.held_out(rows)
