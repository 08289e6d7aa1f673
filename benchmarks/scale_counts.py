"""What each stage of a network asks of a row, and what the simulator takes the hardware to be."""

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import nn

from greedy.build.cut_network import CutNetwork
from greedy.build.modules import build_loss, build_network
from greedy.cache import Encoding, Layout
from greedy.losses import make_heads
from greedy.memory.plan import MemoryPlan
from greedy.models import Shape, StageShapes
from greedy.recipes import load
from greedy.runs.directory import RunDirectory
from greedy.runs.disk_budget import plan_disk
from greedy.runs.disk_demand import ByteOperations
from greedy.runs.disk_plan import DiskPlan
from greedy.runs.plan_basis import PlanBasis
from greedy.runs.state import RunState

IMAGE = (3, 224, 224)
COUNTED_ROWS = 8  # a batch: operations a row hardly depend on its size, counting it does
RECIPES = {"resnet50": "imagenet/resnet50-predsim", "vgg11b-3x": "cifar10/vgg11b-3x-predsim"}
NORMS = nn.modules.batchnorm._BatchNorm
NOWHERE = Path("/run/that/never/begins")


@dataclass(frozen=True)
class Assumptions:
    """What the simulator takes for granted, of one H100 in a node of eight and of its storage.

    Prices are in dollars. ``docs/scale.md`` has the links, their dates, and how the first three
    figures follow from measured steps.
    """

    gpu_rate: float = 580e12  # operations a second: measured products, 482 to 680 (docs/results.md)
    value_seconds: float = 32e-12  # for each value of input and activation: from measured steps
    step_seconds: float = 2.9e-3  # of a step of a stage without operations: from measured steps
    cores: float = 12  # of processors for each GPU: p5.48xlarge, AWS, 2024
    decode_rate: float = 0.40e9  # values of uint8 a second and core, lz4: docs/results.md
    image_rate: float = 0.18e9  # the same for zstd, which images have: docs/results.md
    write_rate: float = 0.75e9  # values a second that a process writes: docs/results.md
    value_bytes: float = 0.86  # of a stored value, uint8 and lz4: docs/results.md
    node: float = 8  # GPUs: p5.48xlarge, AWS, 2024
    bus: float = 480e9  # bytes a second of an all-reduce in a node: nccl-tests issue 309, 2025
    link: float = 46e9  # the same from a GPU to one of another node: issue 290, 2025
    latency: float = 60e-6  # seconds of an all-reduce of few bytes: nccl issue 1453, 2024
    nvme_read: float = 6.5e9  # bytes a second of a GPU's disk: Samsung PM9A3, Engadget, 2020
    nvme_write: float = 3.5e9  # the same
    nvme_bytes: float = 3.84e12  # of a GPU's disk: p5.48xlarge, AWS, 2024
    object_rate: float = 12.5e9 / 8  # bytes a second and GPU: 100 Gb/s a node, assumed
    gets: float = 5500  # requests a second that all GPUs together get of a store: AWS, one prefix
    gpu_price: float = 3.90  # an hour: costnimbus.com, March 2026
    gb_price: float = 0.023  # a month of 10^9 bytes in object storage: cloudburn.io, March 2026
    get_price: float = 0.4e-6  # a request: devnotes.tech, S3 Standard
    put_price: float = 5e-6  # the same

    def row_seconds(self, counts: "Counts") -> float:
        """Returns the seconds that a row takes in a step that trains a stage."""
        return counts.flops / self.gpu_rate + counts.values * self.value_seconds

    def frozen_seconds(self, counts: "Counts") -> float:
        """Returns the seconds that a row takes in a frozen stage: a third of the passes over
        values."""
        return counts.forward_flops / self.gpu_rate + counts.values * self.value_seconds / 3

    def byte_operations(self, stages: "Sequence[Counts]", storage: str) -> ByteOperations:
        """Returns the multiply-adds that take as long as a byte of a store: those of the median
        stage, as ``greedy bench`` takes it."""
        rates = (stage.forward_flops / 2 / self.frozen_seconds(stage) for stage in stages)
        computed, object_rate = statistics.median(rates), self.object_rate
        read, written = (
            (self.nvme_read, self.nvme_write) if storage == "nvme" else (object_rate, object_rate)
        )
        decoded = self.decode_rate * self.value_bytes * self.cores
        encoded = self.write_rate * self.value_bytes
        return ByteOperations(computed / min(decoded, read), computed / min(encoded, written))


@dataclass(frozen=True)
class Counts:
    """What a row asks of a stage.

    Attributes:
        name: of the stage.
        flops: of a training step, two for a multiply-add, heads and loss included.
        forward_flops: of the frozen stage.
        values: in its input and activation.
        output: the shape of its output.
        parameters: of stage and heads.
        features: numbers in z and p.
        channels: of each batch norm, those of heads included.
    """

    name: str
    flops: float
    forward_flops: float
    values: int
    output: Shape
    parameters: int
    features: int
    channels: tuple[int, ...]


@dataclass(frozen=True)
class Counted:
    """A network, counted for one loss, number of classes and strategy.

    Attributes:
        recipe: the name of its recipe.
        settings: that the recipe was counted with.
        shapes: of its stages.
        stages: what a row asks of each.
    """

    recipe: str
    settings: tuple[str, ...]
    shapes: tuple[StageShapes, ...]
    stages: tuple[Counts, ...]

    def disk(self, rows: int, byte_operations: ByteOperations, settings: Sequence[str]) -> DiskPlan:
        """Returns the stores that a run keeps on a disk with room for all of them.

        Args:
            rows: of the training split; there is no test split.
            byte_operations: multiply-adds that take as long as a byte of a store.
            settings: of epochs and stores, as for ``--set``.
        """
        recipe = load(self.recipe, [*self.settings, "store.disk_budget='1000000TiB'", *settings])
        state = RunState.read(RunDirectory(NOWHERE, recipe))
        images = rows * math.prod(IMAGE)
        basis = PlanBasis(budget=None, **byte_operations._asdict())
        return plan_disk(state, self.shapes, {"train": rows, "test": 0}, images, basis)


@cache
def counted(network: str, classes: int, loss: str, strategy: str) -> Counted:
    """Counts a network for images of side 224, without its weights.

    Args:
        network: one of ``RECIPES``; the stages of ``resnet50`` are its blocks.
        classes: number of classes.
        loss: the name of the local loss.
        strategy: ``greedy``, for local losses, or ``backprop``.
    """
    settings = (
        "data.augmentation='random-resized-crop+hflip'",
        f"training.batch_size={COUNTED_ROWS}",
        f"training.strategy='{strategy}'",
        f"loss.name='{loss}'",
    )
    recipe = load(RECIPES[network], settings)
    modules = build_network(recipe.model, IMAGE, classes)
    cut = CutNetwork.of(recipe, modules, IMAGE, classes, build_loss(recipe.loss))
    plan = MemoryPlan(recipe, cut, "bfloat16", None, "cuda")
    stages = (_counts(plan, number) for number in range(1, len(cut) + 1))
    return Counted(RECIPES[network], settings, tuple(cut.shapes), tuple(stages))


def _counts(plan: MemoryPlan, number: int) -> Counts:
    network = plan.network
    stage, shapes = network.stages[number - 1], network.shapes[number - 1]
    with torch.device("meta"):
        heads = make_heads(plan.loss_of(number), shapes.hidden, network.classes)
        features = heads.eval()(torch.empty(2, *shapes.hidden))
    return Counts(
        name=network.name(number),
        flops=plan.flops(number) / COUNTED_ROWS,
        forward_flops=2 * shapes.operations,
        values=math.prod(shapes.input) + math.prod(shapes.hidden),
        output=shapes.output,
        parameters=sum(p.numel() for p in (*stage.parameters(), *heads.parameters())),
        features=sum(f.shape[1] for f in features if f is not None),
        channels=tuple(_channels(stage, heads)),
    )


def _channels(*modules: nn.Module) -> Iterator[int]:
    parts = (part for module in modules for part in module.modules())
    return (part.num_features for part in parts if isinstance(part, NORMS))


def chunk_rows(rows: int, shape: Shape) -> int:
    """Returns the rows in a chunk of a store."""
    return Layout.fit(1, rows, Encoding("float32", shape)).chunk_rows


@dataclass(frozen=True)
class Cluster:
    """GPUs with their storage, ``nvme`` or ``object``, and the rows that they train on."""

    assumed: Assumptions
    gpus: int
    storage: str
    rows: int
    batch: int

    @property
    def steps(self) -> int:
        """The steps of an epoch."""
        return math.ceil(self.rows / self.batch)

    @property
    def rows_each(self) -> int:
        """The rows of a batch on the GPU that has most."""
        return math.ceil(self.batch / self.gpus)

    @property
    def bus(self) -> float:
        """The bytes a second of an all-reduce, as its bus bandwidth: between nodes that of all
        their cards, as measured (issue 309: 366 GB/s)."""
        a = self.assumed
        return a.bus if self.gpus <= a.node else min(a.bus, a.node * a.link)

    def reading(self, rows: int, shape: Shape, readers: int, *, images: bool = False) -> float:
        """Returns the seconds in which ``readers`` GPUs read rows of a store."""
        a, values = self.assumed, rows * math.prod(shape)
        size = values * (1 if images else a.value_bytes)
        decoding = values / ((a.image_rate if images else a.decode_rate) * a.cores * readers)
        if self.storage == "nvme":
            return max(decoding, size / (a.nvme_read * readers))
        asking = rows / chunk_rows(self.rows, shape) / a.gets
        return max(decoding, size / (a.object_rate * readers), asking)

    def writing(self, values: float) -> float:
        """Returns the seconds in which all GPUs write values."""
        a = self.assumed
        disk = a.nvme_write if self.storage == "nvme" else a.object_rate
        return max(values / a.write_rate, values * a.value_bytes / disk) / self.gpus
