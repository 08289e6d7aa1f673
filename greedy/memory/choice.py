"""The choice of memory mode and micro-batch for a stage under a memory budget."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from greedy.base.devices import free_memory
from greedy.base.errors import UserError
from greedy.base.sizes import format_size, parse_size
from greedy.base.torch_private import BATCH_NORMS
from greedy.memory.peaks import StepDemand
from greedy.models import Shape
from greedy.recipes import Recipe
from greedy.runs.choices import Mode, StepMemory, modes
from greedy.steps.parts import parts_of
from greedy.steps.step import Learner
from greedy.stores.writing import write_batch

LARGEST_MICRO_BATCH = 32  # rows; with more, a step is no faster
POSITIONS = 1024  # of feature maps in a micro-batch; with fewer, reading weights takes longest
# Bytes on CUDA, measured by `benchmarks/workspace.py`. cuBLAS: one workspace for each thread, of
# the forward and of the backward pass, and one for products with a bias.
CUBLAS_WORKSPACE = 2 * (2 * 2**22 + 8 * 2**14) + 2**20
CUDNN_WORKSPACE = 16 * 2**20
FRAGMENTATION = 1.02  # bytes that CUDA's allocator reserves for each byte in use
FREE_MEMORY_SHARE = 0.85  # of the device's free memory, used by ``auto``


@dataclass(frozen=True)
class Choice(StepMemory):
    """A memory mode with the rows of its micro-batches.

    Attributes:
        peak_bytes: bytes that a step takes at most.
        write_batch: rows that the frozen stage computes at a time.
        draws_streamed: whether the frozen stages that views of the source are drawn through are on
            the device only while they compute.
        writes_streamed: whether those are so that the stage's own store is written through.
        drawing_bytes: bytes that drawing views of the source takes at most beside a step, on a
            device of its own or besides ``peak_bytes``; 0 if the two take turns.
    """

    peak_bytes: int = 0
    write_batch: int = 1
    draws_streamed: bool = False
    writes_streamed: bool = False
    drawing_bytes: int = 0

    def recorded(self) -> dict[str, Any]:
        """Returns the fields of the choice for ``Choices``, as JSON values by name."""
        counted = {"planned_peak_bytes": self.peak_bytes, "write_batch": self.write_batch}
        return super().recorded() | counted


def memory_budget(recipe: Recipe, device: torch.device, processes: int = 1) -> int:
    """Returns the bytes that a step may take on the device: those that the recipe names, else a
    share of the free memory, which main memory is divided over the ``processes`` of a machine."""
    named = named_budget(recipe)
    if named is not None:
        return named
    sharing = 1 if device.type == "cuda" else processes
    return int(FREE_MEMORY_SHARE * free_memory(device)) // sharing


def named_budget(recipe: Recipe) -> int | None:
    """Returns the memory budget that the recipe names, in bytes; ``None`` for ``auto``."""
    setting = recipe.memory.budget
    return None if setting == "auto" else parse_size(setting)


def room_for(learner: Learner) -> int:
    """Returns the bytes that a stage may take on the device after a step ran out of memory and was
    freed: those of its weights and optimiser state, and the share of free memory that ``auto``
    uses."""
    states = learner.optimizer.state.values() if learner.optimizer else ()
    moments = [value for state in states for value in state.values()]
    tensors = [*learner.parameters(), *learner.buffers(), *filter(torch.is_tensor, moments)]
    on_device = sum(t.numel() * t.element_size() for t in tensors if t.device == learner.device)
    return on_device + int(FREE_MEMORY_SHARE * free_memory(learner.device))


def stored_row_bytes(encoding: str, shape: Shape) -> int:
    """Returns the bytes of a row of a shape in a store, uncompressed; ``auto`` has one byte for
    each value."""
    bits = {"float32": 32, "float16": 16, "bfloat16": 16, "uint4": 4}
    return math.ceil(math.prod(shape) * bits.get(encoding, 8) / 8)


def fused_adam(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """Returns the Adam that trains stages by default; the schedule sets its rate."""
    return torch.optim.Adam(parameters, fused=True)


def choose(
    demand: StepDemand,
    budget: int | None,
    micro_batch: int | None = None,
    writing: StepDemand | None = None,
) -> Choice:
    """Chooses how a stage's step fits a budget.

    Args:
        demand: the demand of the step.
        budget: bytes on the device, on CUDA those that the allocator reserves, libraries'
            workspaces included; ``None`` for any number.
        micro_batch: rows of a micro-batch, if the recipe fixes them.
        writing: the demand of writing the stage's store, if that differs.

    Returns:
        The fastest mode that fits, with the largest micro-batch; without a budget the plain mode.

    Raises:
        UserError: nothing fits; the message names the stage and the least memory that it takes.
    """
    step = _fastest(demand, budget, micro_batch)
    if budget is not None and step.peak_bytes > budget:
        raise UserError(_refusal(demand, step, budget, micro_batch))
    return _with_writing(step, writing or demand, budget)


def choose_smaller(
    demand: StepDemand,
    failed: StepMemory,
    room: int,
    micro_batch: int | None = None,
    writing: StepDemand | None = None,
) -> Choice | None:
    """Chooses how a stage's steps continue after one ran out of memory.

    Args:
        demand: the demand of the step.
        failed: the memory mode of the step that failed.
        room: bytes that the stage may take on the device.
        micro_batch: rows of a micro-batch, if the recipe fixes them; others are tried only if these
            do not fit.
        writing: the demand of writing the stage's store, if that differs.

    Returns:
        The fastest mode that fits and takes less than ``failed``, or else the smallest; ``None`` if
        none takes less than ``failed``.
    """
    too_much = _count(demand, failed.mode, failed.micro_batch).peak_bytes
    room = min(room, too_much - 1)
    step = _fastest(demand, room, micro_batch)
    if step.peak_bytes > room and micro_batch is not None:
        step = _fastest(demand, room, None)
    return _with_writing(step, writing or demand, room) if step.peak_bytes < too_much else None


def _with_writing(step: Choice, writing: StepDemand, budget: int | None) -> Choice:
    return replace(step, write_batch=rows_written(writing, budget))


def rows_written(writing: StepDemand, budget: int | None) -> int:
    """Returns how many rows a frozen stage computes at a time when its store is written: as many as
    fit a budget, which is ``None`` for any number, and at least one."""
    rows = write_batch(writing.shapes, writing.device_type)
    while budget is not None and rows > 1 and writing.writing_peak(rows) > budget:
        rows //= 2
    return rows


def _fastest(demand: StepDemand, budget: int | None, micro_batch: int | None) -> Choice:
    """Returns the fastest choice that fits the budget, or the smallest if none fits."""
    tried = [_count(demand, Mode.PLAIN, demand.rows)]
    if budget is None or tried[0].peak_bytes <= budget:
        return tried[0]
    fitting = []
    for mode in _smaller_modes(demand):
        tried.append(_count(demand, mode, micro_batch or 1))
        if tried[-1].peak_bytes <= budget:
            if micro_batch:
                return tried[-1]
            fitting.append(_enlarged(demand, tried[-1], budget))
            if fitting[-1].micro_batch >= _worthwhile(demand):
                return fitting[-1]
    if fitting:
        return max(fitting, key=lambda choice: choice.micro_batch)
    return min(tried, key=lambda choice: choice.peak_bytes)


def _smaller_modes(demand: StepDemand) -> list[Mode]:
    """Returns the modes of a stage but ``plain``. In a block without batch norm, nothing would be
    kept in those that keep c."""
    if demand.why_plain:
        return []
    with torch.device("meta"):
        heads = demand.loss.heads(demand.shapes.hidden, demand.num_classes)
    is_layer = parts_of(demand.stage, heads, demand.shapes.hidden) is not None
    modules = (*demand.stage.modules(), *heads.modules())
    keeps = is_layer or any(isinstance(module, BATCH_NORMS) for module in modules)
    return [mode for mode in modes(demand.device_type)[1:] if keeps or not mode.keeps_c]


def _worthwhile(demand: StepDemand) -> int:
    """Returns the rows of a micro-batch below which reading the weights takes longer than using
    them, so that a mode which recomputes more is faster."""
    hidden = demand.shapes.hidden
    positions = hidden[0] if len(hidden) == 2 else math.prod(hidden[1:])
    return min(LARGEST_MICRO_BATCH, demand.rows // 2, math.ceil(POSITIONS / positions))


def _count(demand: StepDemand, mode: Mode, micro_batch: int) -> Choice:
    peak = demand.peak(StepMemory(mode, micro_batch))
    return Choice(mode, micro_batch, reserved(peak, demand.device_type))


def reserved(peak: int, device_type: str) -> int:
    """Returns the bytes that a device's allocator takes for tensors of ``peak`` bytes."""
    if device_type != "cuda":
        return peak
    return int(peak * FRAGMENTATION) + CUBLAS_WORKSPACE + CUDNN_WORKSPACE


def usable(budget: int, device_type: str) -> int:
    """Returns the bytes that tensors may take on a device whose allocator may take ``budget``."""
    if device_type != "cuda":
        return budget
    return int((budget - CUBLAS_WORKSPACE - CUDNN_WORKSPACE) / FRAGMENTATION)


def _enlarged(demand: StepDemand, choice: Choice, budget: int) -> Choice:
    """Returns a choice that fits the budget with the largest micro-batch that does, a power of
    two."""
    largest = min(LARGEST_MICRO_BATCH, demand.rows // 2)
    sizes = [1 << power for power in range(1, largest.bit_length())]
    guess = len(sizes) - 1  # most often the largest fits
    while sizes:
        tried = _count(demand, choice.mode, sizes[guess])
        if tried.peak_bytes <= budget:
            choice, sizes = tried, sizes[guess + 1 :]
        else:
            row = (tried.peak_bytes - choice.peak_bytes) / (tried.micro_batch - choice.micro_batch)
            rows = choice.micro_batch + (budget - choice.peak_bytes) / row
            sizes = sizes[:guess]
            guess = sum(size <= rows for size in sizes) - 1
        guess = max(0, min(guess, len(sizes) - 1))
    return choice


def _refusal(demand: StepDemand, least: Choice, budget: int, micro_batch: int | None) -> str:
    parameters = demand.parameter_bytes()
    frozen = demand.frozen_bytes()
    replayed = f", {format_size(frozen)} for frozen stages" if frozen else ""
    rows = f" and micro-batches of {micro_batch}" if micro_batch else ""
    lower = "memory.micro_batch or " if micro_batch and micro_batch > 1 else ""
    state = " and the optimiser's state" if demand.optimizer else ""
    way_out = ""
    if demand.optimizer and demand.processes > 1 and not demand.is_divided:
        way_out += ", divide the optimiser's state with --optimizer-state sharded"
    if demand.optimizer:
        way_out += ", keep the optimiser's state in host memory with --optimizer-state host"
    return (
        f"stage {demand.stage.number} ({demand.stage.name}) takes at least "
        f"{format_size(least.peak_bytes)} ({format_size(parameters)} for weights, gradients{state}"
        f"{replayed}, the rest for activations in mode {least.mode}{rows}) and the memory budget "
        f"is {format_size(budget)}: raise --memory-budget{way_out} or lower "
        f"{lower}training.batch_size"
    )
