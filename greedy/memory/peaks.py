"""The memory and operations of one step of a stage, counted on fake tensors."""

from collections.abc import Callable, Hashable, Iterable, Sequence
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from greedy.base.precision import autocast
from greedy.base.ranks import Shares
from greedy.base.torch_private import DEPENDS_ON_NUMBERS, without_modes
from greedy.cache.order import largest_share
from greedy.losses import LocalLoss, make_heads
from greedy.memory.counting import Counter
from greedy.memory.counts import META, Counts, FrozenStage, Pass, stage_bytes, tensor_bytes
from greedy.memory.fake import (
    LossStandIn,
    count_with_loss,
    fake_tensors,
    largest_first,
    make_state,
    materialise,
)
from greedy.models import Shape, Stage, StageShapes
from greedy.runs.choices import StepMemory
from greedy.steps.step import Learner, gradients
from greedy.steps.unfolded import unfolds
from greedy.stores.channels_last import laid_out, takes_channels_last
from greedy.stores.source import WRITE_ROWS, Batch
from greedy.stores.source import replay as compute_replay

CPU = torch.device("cpu")

T = TypeVar("T")

OptimizerFactory = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


@dataclass(frozen=True)
class FrozenStages:
    """The frozen stages between a store and the stage that trains.

    Attributes:
        stages: the stages, in order.
        shape: the shape of a row of the store.
        rows: rows computed at a time.
        streamed: whether each is on the device only while it computes.
    """

    stages: Sequence[Stage]
    shape: Shape
    rows: int
    streamed: bool = False


@dataclass(frozen=True)
class StepDemand:
    """Everything that decides the memory of a stage's step.

    Attributes:
        stage: the stage; it stays as it is.
        shapes: the shapes of its input, activation and output.
        loss: its local loss.
        num_classes: the number of classes.
        batch_size: rows in a batch.
        precision: ``float32``, ``bfloat16`` or ``float16``.
        optimizer: makes the stage's optimiser; ``None`` if its state is in host memory.
        device_type: ``cpu``, ``cuda`` or ``mps``; on ``cpu`` host memory is the device's.
        stored_row_bytes: bytes of a row in the source.
        replay: the frozen stages between the source and the stage, if any.
        other_resident_bytes: bytes of other stages on the device, needed to draw views.
        processes: the number of processes that compute a batch together; the memory is that of one.
        is_divided: whether they have divided the optimiser's state among them.
        why_plain: why the stage has no mode but ``plain``; empty if it has all.
        counts: what was counted before for equal stages, and what is counted now.
    """

    stage: Stage
    shapes: StageShapes
    loss: LocalLoss
    num_classes: int
    batch_size: int
    precision: str
    optimizer: OptimizerFactory | None
    device_type: str
    stored_row_bytes: int
    replay: FrozenStages | None = None
    other_resident_bytes: int = 0
    processes: int = 1
    is_divided: bool = False
    why_plain: str = ""
    counts: Counts = field(default_factory=Counts, compare=False, repr=False)

    @property
    def rows(self) -> int:
        """The rows of a batch that a process computes at most."""
        return largest_share(self.batch_size, self.processes)

    def peak(self, memory: StepMemory) -> int:
        """Counts the most bytes on the device in a step in a memory mode, any but the first step:
        weights, gradients, optimiser state, the batch, and everything computed from it."""
        reads = [rows.stop - rows.start for rows in memory.slices(self.rows)[:2]]
        peak = self._count(("step", memory), lambda demand: demand._peak(memory), reads)
        return peak + self._other_bytes()

    def _other_bytes(self) -> int:
        """Returns the bytes of other stages that are on the device all the time."""
        replayed = self.replay.stages if self.replay and not self.replay.streamed else ()
        return self.other_resident_bytes + sum(map(stage_bytes, replayed))

    def _count(
        self, of: Hashable, count: Callable[["StepDemand"], int], reads: Sequence[int] = ()
    ) -> int:
        """Returns a count of a step that reads inputs of ``reads`` rows. What matters of the frozen
        stages between is what these take, so that steps behind other stages have the same count."""
        what = f"stage {self.stage.number} ({self.stage.name})"

        def counted(of_demand: Callable[["StepDemand"], T]) -> T:
            return count_with_loss(
                lambda loss: of_demand(replace(self, loss=loss)), self.loss, what
            )

        read = tuple(counted(partial(StepDemand._read, rows=rows)) for rows in reads)
        return self.counts.number((of, read, *self._key()), lambda: counted(count))

    def _key(self) -> tuple[Hashable, ...]:
        """Returns what decides the counts."""
        return (
            self.counts.kind(self.stage),
            self.shapes,
            key_of(self.loss),
            self.num_classes,
            self.batch_size,
            self.precision,
            id(self.optimizer),
            self.device_type,
            self.processes,
        )

    def _peak(self, memory: StepMemory) -> int:
        with fake_tensors(), Counter() as counter:
            learner = self._learner(memory)
            counter.add(_tensors_of(learner))
            batch = self._batch(learner, counter, largest_first(self.batch_size, self.processes))
            counter.reset_peak()
            kept = [buffer.clone() for buffer in learner.buffers()]  # as a step that may fail does
            gradients(learner, batch)
            del kept
        state = self.parameter_bytes() - 2 * tensor_bytes(learner.parameters())
        mask = 0 if batch.mask is None else tensor_bytes([batch.mask])
        return max(counter.peak + state, self._optimizer_peak() + mask)

    def _optimizer_peak(self) -> int:
        """Counts the most bytes in a step of the optimiser: weights, gradients, state and what it
        computes from them."""
        return self.counts.number(("optimizer", *self._key()), self._counted_optimizer)

    def _counted_optimizer(self) -> int:
        if self.optimizer is None:
            return 0
        with fake_tensors(), Counter() as counter:
            learner = self._learner(StepMemory())  # whose buffers count, too
            parameters = learner.parameters()
            optimizer = self.optimizer(parameters)
            if not make_state(parameters, [optimizer]):
                return 0
            for group in optimizer.param_groups if self.device_type == "cuda" else ():
                if group.get("foreach", False) is None and not group.get("fused"):
                    group["foreach"] = True  # torch's choice on a GPU
            for parameter in parameters:
                parameter.grad = torch.zeros_like(parameter)
            counter.add(parameters)
            counter.reset_peak()
            with suppress(*DEPENDS_ON_NUMBERS):  # what was counted until then is a lower bound
                optimizer.step()
        return counter.peak

    def writing_peak(self, rows: int) -> int:
        """Counts the most bytes on the device while the trained stage computes the outputs and the
        local error of ``rows`` rows."""
        peak = self._count("writing", lambda demand: demand._writing_peak(rows), [rows])
        return peak + self._other_bytes()

    def _writing_peak(self, rows: int) -> int:
        with fake_tensors(), Counter() as counter, torch.no_grad():
            learner = self._learner(StepMemory())
            learner.eval()
            counter.add(_tensors_of(learner))
            counter.reset_peak()
            x = self._read(rows).taken(counter)
            learner.features(x)
            last = takes_channels_last(learner.stage, self.device_type)
            (stage,) = laid_out([learner.stage], [last])
            with learner.autocast():
                stage(x).float()
        return counter.peak

    def flops(self) -> int:
        """Counts the floating-point operations of the plain step, two for a multiply-add."""
        return self._count("operations", StepDemand._flops, [self.batch_size])

    def _flops(self) -> int:
        with fake_tensors(), FlopCounterMode(display=False) as counter:
            learner = self._learner(StepMemory())
            gradients(learner, self._batch(learner, Counter()))
        return counter.get_total_flops()

    def parameter_bytes(self) -> int:
        """Returns the bytes of weights, gradients and optimiser state."""
        return self.counts.number(("parameters", *self._key()), self._parameter_bytes)

    def _parameter_bytes(self) -> int:
        with fake_tensors():
            parameters = self._learner(StepMemory()).parameters()
            state: list[Any] = []
            if self.optimizer is not None:
                optimizer = self.optimizer(parameters)
                make_state(parameters, [optimizer])
                state = [v for kept in optimizer.state.values() for v in kept.values()]
        return tensor_bytes([*parameters, *parameters, *filter(torch.is_tensor, state)])

    def frozen_bytes(self) -> int:
        """Returns the bytes of the weights of all other stages on the device."""
        replayed = [weight_bytes(stage) for stage in (self.replay.stages if self.replay else ())]
        at_once = max if self.replay and self.replay.streamed else sum
        return self.other_resident_bytes + at_once(replayed)

    def _learner(self, memory: StepMemory) -> Learner:
        with without_modes():  # since fake tensors cannot be computed with real ones
            stage = deepcopy(self.stage).to("meta")
        materialise(stage)
        heads = make_heads(self.loss, self.shapes.hidden, self.num_classes)
        host = CPU if self.device_type == "cpu" else META
        learner = Learner(
            stage,
            heads,
            self.loss,
            self.num_classes,
            self.precision,
            unfolds=unfolds(self.shapes.hidden, self.precision, self.device_type),
            memory=memory,
            host=host,
            memory_trial=True,
            shape=self.shapes.hidden,
        )
        learner.train()
        return learner

    def _read(self, rows: int) -> Pass:
        """Returns what it takes to compute the stage's input for some rows of a batch as
        ``Source.inputs`` does."""
        replay = self.replay or FrozenStages((), self.shapes.input, WRITE_ROWS)
        kinds = tuple(map(self.counts.kind, replay.stages))
        layouts = tuple(takes_channels_last(each, self.device_type) for each in replay.stages)
        what = replace(replay, stages=()), rows, self.stored_row_bytes
        key = (kinds, layouts, *what, self.precision)
        if key not in self.counts.passes:
            self.counts.passes[key] = self._counted_read(replay, layouts, rows)
        return self.counts.passes[key]

    def _counted_read(self, replay: FrozenStages, layouts: Sequence[bool], rows: int) -> Pass:
        with fake_tensors(), Counter() as counter, torch.no_grad():
            frozen = [
                FrozenStage(stage, self.counts, counter, self.precision, streamed=replay.streamed)
                for stage in replay.stages
            ]
            before = counter.live
            counter.reset_peak()
            stored = torch.empty((rows, self.stored_row_bytes), dtype=torch.uint8)
            x = torch.empty((rows, *replay.shape))
            del stored  # freed once x is decoded
            with autocast("cpu", self.precision):
                x = compute_replay(laid_out(frozen, layouts), x, replay.rows).float()
            for stage in frozen:
                stage.end()
            return Pass.of(x, counter, before)

    def _batch(self, learner: Learner, counter: Counter, shares: Shares | None = None) -> Batch:
        def read(rows: slice) -> torch.Tensor:
            start, stop, _ = rows.indices(self.rows)
            return self._read(stop - start).taken(counter)

        labels = torch.zeros(self.batch_size, dtype=torch.long)
        batch = Batch(labels, read, shares=shares)
        mask = learner.mask(0, self.batch_size, self.shapes.input, 0, 0)
        return replace(batch, mask=batch.own(mask))


def key_of(loss: Any) -> Hashable:
    """Returns what is the same for losses that are equal, or one and the same if they have no
    hash."""
    try:
        hash(loss)
        return loss
    except TypeError:
        if isinstance(loss, LossStandIn):  # made for one count, so its own number is soon another's
            return LossStandIn, id(loss.loss)
        return id(loss)


def weight_bytes(stage: Stage) -> int:
    """Returns the bytes of a stage's weights."""
    return tensor_bytes(stage.parameters())


def _tensors_of(learner: Learner) -> list[torch.Tensor]:
    """Returns the parameters and buffers of stage and heads."""
    modules = (learner.stage, learner.heads)
    return [tensor for m in modules for tensor in (*m.parameters(), *m.buffers())]
