"""Which memory mode and micro-batch a stage gets under a budget."""

from dataclasses import dataclass

import torch

from greedy.errors import UserError
from greedy.losses import LocalLoss
from greedy.memory.peaks import OptimizerFactory, StepDemand
from greedy.models import Stage, StageShapes
from greedy.sizes import format_size
from greedy.training.modes import Mode, StepMemory, modes
from greedy.training.parts import parts_of

LARGEST_MICRO_BATCH = 32  # beyond it a step gains nothing
WORKSPACE = 16 * 2**20  # of convolutions on CUDA
FRAGMENTATION = 1.05  # what CUDA's allocator reserves beyond what is asked of it
AUTO_SHARE = 0.85  # of the memory that is free on the device


@dataclass(frozen=True)
class Choice:
    """A mode, the rows of its micro-batches, and the bytes that a step takes with them."""

    mode: str
    micro_batch: int
    peak_bytes: int

    @property
    def memory(self) -> StepMemory:
        """As the step takes it."""
        return StepMemory(Mode(self.mode), self.micro_batch)


def fused_adam(parameters: object) -> torch.optim.Optimizer:
    """Adam as stages are trained with it; the rate is the schedule's."""
    return torch.optim.Adam(parameters, fused=True)  # type: ignore[arg-type]


def choose(
    stage: Stage,
    shapes: StageShapes,
    loss: LocalLoss,
    num_classes: int,
    batch_size: int,
    precision: str,
    stored_row_bytes: int,
    budget: int | None,
    optimizer_state: str,
    device_type: str,
    optimizer: OptimizerFactory = fused_adam,
) -> Choice:
    """The fastest mode with the largest micro-batch whose step fits a budget of bytes; without
    a budget the plain mode. On CUDA bytes are those that the allocator reserves, convolutions'
    workspace included. ``optimizer_state`` is ``device`` or ``host``.

    Raises ``UserError`` where nothing fits, naming the stage and what its least consists of.
    """
    demand = StepDemand(
        stage,
        shapes,
        loss,
        num_classes,
        batch_size,
        precision,
        optimizer if optimizer_state == "device" else None,
        device_type,
        stored_row_bytes,
    )
    tried = [_count(demand, Mode.PLAIN, batch_size)]
    if budget is None or tried[0].peak_bytes <= budget:
        return tried[0]
    if parts_of(stage, loss.heads(shapes.hidden, num_classes)) is not None:
        for mode in modes(device_type)[1:]:
            choice = _count(demand, mode, 1)
            tried.append(choice)
            if choice.peak_bytes <= budget:
                return _enlarged(demand, choice, budget)
    least = min(tried, key=lambda choice: choice.peak_bytes)
    raise UserError(_refusal(demand, least, budget))


def _count(demand: StepDemand, mode: Mode, micro_batch: int) -> Choice:
    peak = demand.peak(StepMemory(mode, micro_batch))
    if demand.device_type == "cuda":
        peak = int(peak * FRAGMENTATION) + WORKSPACE
    return Choice(mode, micro_batch, peak)


def _enlarged(demand: StepDemand, choice: Choice, budget: int) -> Choice:
    """The largest power of two that fits, the rows of a micro-batch growing from one."""
    largest = min(LARGEST_MICRO_BATCH, demand.batch_size // 2)
    while choice.micro_batch * 2 <= largest:
        larger = _count(demand, Mode(choice.mode), choice.micro_batch * 2)
        if larger.peak_bytes > budget:
            break
        choice = larger
    return choice


def _refusal(demand: StepDemand, least: Choice, budget: int) -> str:
    parameters = demand.parameter_bytes()
    adam = " and Adam's moments" if demand.optimizer else ""
    way_out = (
        ", keep Adam's moments in host memory with --optimizer-state host"
        if demand.optimizer
        else ""
    )
    return (
        f"stage {demand.stage.number} ({demand.stage.name}) takes at least "
        f"{format_size(least.peak_bytes)} ({format_size(parameters)} for weights, gradients{adam}, "
        f"the rest for activations in mode {least.mode}) and the memory budget is "
        f"{format_size(budget)}: raise --memory-budget{way_out} or lower training.batch_size"
    )
