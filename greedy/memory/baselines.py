"""The memory of one training step of the whole network, counted on fake tensors.

Counted are the bytes of weights, gradients, the optimiser's moments, the batch and everything
computed from it. A real step also needs the working memory of its operators.
"""

import math
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from greedy.base.errors import UserError
from greedy.base.ranks import Shares
from greedy.base.relay import AHEAD
from greedy.base.sizes import format_size
from greedy.build.cut_network import CutNetwork
from greedy.losses import Glob, LocalLoss, make_heads
from greedy.memory.choice import Choice, fused_adam, reserved
from greedy.memory.counting import Counter
from greedy.memory.fake import (
    count_with_loss,
    fake_tensors,
    largest_first,
    make_state,
    materialise,
)
from greedy.memory.peaks import CPU, META, OptimizerFactory
from greedy.models import Stage, StageShapes
from greedy.models.stages import dropped
from greedy.recipes import Training
from greedy.runs.choices import Mode
from greedy.steps.guard import Guard
from greedy.steps.measuring import measure
from greedy.steps.step import Learner
from greedy.steps.strategies import Strategy, together
from greedy.stores.source import Batch
from greedy.stores.writing import write_batch

MICRO_BATCH = 8  # rows, in back-propagation with micro-batches
BASELINES = {
    "backprop": "back-propagation, float32",
    "backprop_bfloat16": "back-propagation, bfloat16",
    "backprop_checkpointed": "back-propagation, checkpointed by stage",
    "backprop_accumulated": (
        f"back-propagation, micro-batches of {MICRO_BATCH} (batch norm not exact)"
    ),
    "joint": "local training of all stages at once",
}

Step = Callable[[Strategy, Batch, Sequence[Tensor | None]], None]


@dataclass(frozen=True)
class NetworkDemand:
    """Everything that decides the memory of a step that trains all stages of a network at once.

    Attributes:
        network: the network; its stages stay as they are.
        batch_size: rows in a batch.
        strategy: the name of the strategy.
        precision: ``float32``, ``bfloat16`` or ``float16``.
        accumulate: number of micro-batches whose gradients are added up.
        optimizer: makes the optimisers; ``None`` if their state is in host memory.
        exact: whether the gradients over micro-batches are those of the whole batch.
        device_type: ``cpu``, ``cuda`` or ``mps``; on ``cpu`` host memory is the device's.
        processes: the number of processes that compute a batch together; the memory is that of one.
        own: the positions of the stages that one process trains; ``None`` for all.
    """

    network: CutNetwork
    batch_size: int
    strategy: str
    precision: str = "float32"
    accumulate: int = 1
    optimizer: OptimizerFactory | None = fused_adam
    exact: bool = False
    device_type: str = "cpu"
    processes: int = 1
    own: range | None = None

    def peak(self, step: Step | None = None) -> int:
        """Counts the most bytes on the device during ``step``, by default a training step of the
        strategy."""

        def peak(loss: LocalLoss) -> int:
            return self._peak(loss, step or _step)

        return count_with_loss(peak, self.network.loss, "the network")

    def _peak(self, loss: LocalLoss, step: Step) -> int:
        own = slice(self.own.start, self.own.stop) if self.own else slice(None)
        copies = [deepcopy(stage).to("meta") for stage in self.network.stages[own]]
        losses = replace(self.network, loss=loss).losses(self.strategy)[own]
        shapes = self.network.shapes[own]
        with fake_tensors(), Counter() as counter:
            learners = [
                _learner(stage, shape, stage_loss, self.network.classes, self.precision)
                for stage, shape, stage_loss in zip(copies, shapes, losses, strict=True)
            ]
            make = self.optimizer or _no_optimizer
            for learner in learners:
                learner.host = CPU if self.device_type == "cpu" else META
            strategy = together(self.strategy, learners, self.accumulate, make, exact=self.exact)
            make_state(
                [p for learner in learners for p in learner.parameters()], strategy.optimizers
            )
            shares = largest_first(self.batch_size, self.processes)
            batch, masks = _batch(learners, shapes, self.batch_size, shares)
            held = self._in_relay()
            counter.reset_peak()
            step(strategy, batch, masks)
            del held
        return counter.peak

    def _in_relay(self) -> list[Tensor]:
        """Returns the batches that are sent or received beside a step, if other processes train the
        stages before or after."""
        every, found = self.network.shapes, []
        if self.own and self.own.start:
            found.append(torch.empty(self.batch_size, *every[self.own.start].input))
        if self.own and self.own.stop < len(every):
            output = every[self.own.stop].input
            found += [torch.empty(self.batch_size, *output) for _ in range(AHEAD)]
        return found


def baselines(
    network: CutNetwork, batch_size: int, optimizer: OptimizerFactory = fused_adam
) -> dict[str, int]:
    """Counts the peak memory in bytes of a step by each other way of training, named as in
    ``BASELINES``, with the optimisers that ``optimizer`` makes. Without a local loss there is no
    ``joint``."""
    backprop = NetworkDemand(network, batch_size, "backprop", optimizer=optimizer)
    peaks = {
        "backprop": backprop.peak(),
        "backprop_bfloat16": replace(backprop, precision="bfloat16").peak(),
        "backprop_checkpointed": backprop.peak(_checkpointed),
        "backprop_accumulated": replace(
            backprop, accumulate=math.ceil(batch_size / MICRO_BATCH)
        ).peak(),
    }
    if not isinstance(network.loss, Glob):
        peaks["joint"] = replace(backprop, strategy="joint").peak()
    return peaks


def choose_network(
    network: CutNetwork,
    training: Training,
    precision: str,
    budget: int | None,
    device_type: str,
    optimizer: OptimizerFactory | None = fused_adam,
    processes: int = 1,
    parts: Sequence[range] = (),
) -> Choice:
    """Returns how a step that trains all stages at once fits a memory budget: in the plain mode,
    the only one it has.

    Args:
        precision: ``float32``, ``bfloat16`` or ``float16``.
        budget: bytes on the device; ``None`` for any number.
        device_type: ``cpu``, ``cuda`` or ``mps``.
        optimizer: makes the optimisers; ``None`` if their state is in host memory.
        processes: the number of processes that compute a batch together.
        parts: the positions of the stages that each process trains, where they divide the stages.

    Raises:
        UserError: the step does not fit.
    """
    demand = NetworkDemand(
        network,
        training.batch_size,
        training.strategy,
        precision,
        training.accumulate,
        optimizer,
        training.exact,
        device_type,
        processes,
    )
    measuring = replace(demand, accumulate=1, exact=False, processes=1)
    every = range(len(network.stages))

    def largest(demand: NetworkDemand, step: Step) -> int:
        peaks = [replace(demand, own=own).peak(step) for own in parts or [every]]
        return reserved(max(peaks), device_type)

    peak = largest(demand, _step)
    if training.patience:  # held-out rows are measured a batch at a time
        peak = max(peak, largest(measuring, _measure))
    if budget is not None and peak > budget:
        what = "the stages of one process" if len(parts) > 1 else "the whole network"
        more = "start more processes, " if 1 < len(parts) < len(network.stages) else ""
        raise UserError(
            f"a step of {what} takes {format_size(peak)} and the memory budget is "
            f"{format_size(budget)}: {more}train one stage at a time (--strategy greedy), lower "
            f"training.batch_size, or raise --memory-budget"
        )
    test_rows = min(write_batch(shapes, device_type) for shapes in network.shapes)
    while budget is not None and test_rows > 1:
        if largest(replace(measuring, batch_size=test_rows), _measure) <= budget:
            break
        test_rows //= 2
    rows = math.ceil(training.batch_size / training.accumulate)
    return Choice(Mode.PLAIN, rows, peak, test_rows)


class _Unguarded(Guard):
    """A guard that looks at no numbers, which fake tensors do not have."""

    def update(self, optimizer: torch.optim.Optimizer, *what: object) -> None:
        optimizer.step()


def _step(strategy: Strategy, batch: Batch, masks: Sequence[Tensor | None]) -> None:
    strategy.step(batch, masks, _Unguarded(), 0)


def _measure(strategy: Strategy, batch: Batch, masks: Sequence[Tensor | None]) -> None:
    """Evaluates a batch of the test split while the gradients of the last step are in memory."""
    for parameter in (p for learner in strategy.learners for p in learner.parameters()):
        parameter.grad = torch.zeros_like(parameter)
    measure(strategy.learners, [batch])


def _checkpointed(strategy: Strategy, batch: Batch, masks: Sequence[Tensor | None]) -> None:
    """Takes a step of back-propagation that keeps only the stages' outputs, and computes everything
    within a stage again in the backward pass."""
    x = batch.inputs()
    for learner, mask in zip(strategy.learners, masks, strict=True):
        x = checkpoint(
            learner.stage,
            dropped(x, mask),
            use_reentrant=False,
            preserve_rng_state=False,
        )
    F.cross_entropy(x, strategy.learners[-1].one_hot(batch.labels)).backward()
    strategy.optimizers[0].step()


def _learner(
    stage: Stage, shape: StageShapes, loss: LocalLoss, num_classes: int, precision: str
) -> Learner:
    """Returns a stage in training mode, with weights and heads on the device."""
    heads = make_heads(loss, shape.hidden, num_classes)
    learner = Learner(materialise(stage), heads, loss, num_classes, precision, memory_trial=True)
    learner.train()
    return learner


def _batch(
    learners: Sequence[Learner],
    shapes: Sequence[StageShapes],
    batch_size: int,
    shares: Shares | None,
) -> tuple[Batch, list[Tensor | None]]:
    def read(rows: slice) -> Tensor:
        start, stop, _ = rows.indices(batch.rows)
        return torch.zeros((stop - start, *shapes[0].input))

    batch = Batch(torch.zeros(batch_size, dtype=torch.long), read, shares=shares)
    masks = [
        batch.own(learner.mask(0, batch_size, shape.input, 0, 0))
        for learner, shape in zip(learners, shapes, strict=True)
    ]
    return batch, masks


def _no_optimizer(parameters: object) -> torch.optim.Optimizer:
    """Returns an optimiser that stands for one whose state is not on the device."""
    return torch.optim.SGD([torch.zeros(1, requires_grad=True)])
