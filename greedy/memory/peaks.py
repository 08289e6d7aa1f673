"""What one step of a stage takes, counted on fake tensors."""

from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from greedy.losses import LocalLoss, make_heads
from greedy.memory.counting import Counter
from greedy.memory.fake import counted, fake_tensors, make_state, materialised
from greedy.models import Shape, Stage, StageShapes
from greedy.runs.choices import StepMemory
from greedy.steps.step import Learner, gradients
from greedy.stores.source import WRITE_ROWS, Batch, replay

CPU, META = torch.device("cpu"), torch.device("meta")

OptimizerFactory = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


@dataclass(frozen=True)
class Replay:
    """Frozen stages that are computed on the way from a store to the stage that trains, so many
    ``rows`` at a time; ``shape`` is that of a row of the store."""

    stages: Sequence[Stage]
    shape: Shape
    rows: int


@dataclass(frozen=True)
class StepDemand:
    """A stage's step as memory sees it.

    Attributes:
        batch_size: rows of a batch.
        precision: ``float32``, ``bfloat16`` or ``float16``.
        optimizer: makes the stage's optimiser; ``None`` if its state is in host memory.
        device_type: of the device; on ``cpu`` host memory is the device's.
        stored_row_bytes: of a row as the source holds it.
        replay: what lies between the source and the stage.
        other_resident_bytes: of frozen stages that are on the device besides, to draw views with.
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
    replay: Replay | None = None
    other_resident_bytes: int = 0

    def peak(self, memory: StepMemory) -> int:
        """Bytes on the device at most, in a step with this memory after the first one: weights,
        gradients, optimiser state, the batch, and what is computed from it."""
        return self._counted(lambda demand: demand._peak(memory))

    def _counted(self, count: Callable[["StepDemand"], int]) -> int:
        what = f"stage {self.stage.number} ({self.stage.name})"
        return counted(lambda loss: count(replace(self, loss=loss)), self.loss, what)

    def _peak(self, memory: StepMemory) -> int:
        stage, *replayed = self._skeletons()
        with fake_tensors(), Counter() as counter:
            learner = self._learner(stage, memory)
            counter.add(_held(learner))
            if self.optimizer is not None:
                learner.optimizer = self.optimizer(learner.parameters())
                make_state(learner.parameters(), [learner.optimizer])
            batch = self._batch(learner, replayed)
            counter.reset_peak()
            gradients(learner, batch)
        return counter.peak + self.other_resident_bytes

    def writing_peak(self, rows: int) -> int:
        """Bytes on the device at most, while the trained stage computes the outputs and the local
        error of so many rows."""
        return self._counted(lambda demand: demand._writing_peak(rows))

    def _writing_peak(self, rows: int) -> int:
        stage, *replayed = self._skeletons()
        with fake_tensors(), Counter() as counter, torch.no_grad():
            learner = self._learner(stage, StepMemory())
            learner.eval()
            counter.add(_held(learner))
            read = self._reader(learner, replayed)
            counter.reset_peak()
            x = read(slice(0, rows))
            learner.features(x)
            with learner.autocast():
                learner.stage(x).float()
        return counter.peak + self.other_resident_bytes

    def flops(self) -> int:
        """Floating-point operations of the plain step, a multiply-add counting 2."""
        return self._counted(StepDemand._flops)

    def _flops(self) -> int:
        stage, *_ = self._skeletons()
        with fake_tensors(), FlopCounterMode(display=False) as counter:
            learner = self._learner(stage, StepMemory())
            gradients(learner, self._batch(learner, []))
        return counter.get_total_flops()

    def parameter_bytes(self) -> int:
        """Bytes of weights, gradients and optimiser state."""
        stage, *_ = self._skeletons()
        with fake_tensors():
            parameters = self._learner(stage, StepMemory()).parameters()
        copies = 2 if self.optimizer is None else 4
        return copies * sum(p.numel() * p.element_size() for p in parameters)

    def frozen_bytes(self) -> int:
        """Bytes of the weights of frozen stages."""
        replayed = self.replay.stages if self.replay else ()
        return self.other_resident_bytes + sum(map(weight_bytes, replayed))

    def _skeletons(self) -> list[Stage]:
        """The stage and those that are replayed, without their weights: real tensors and fake
        ones do not mix."""
        replayed = self.replay.stages if self.replay else ()
        return [deepcopy(stage).to("meta") for stage in (self.stage, *replayed)]

    def _learner(self, stage: Stage, memory: StepMemory) -> Learner:
        materialised(stage)
        heads = make_heads(self.loss, self.shapes.hidden, self.num_classes)
        host = CPU if self.device_type == "cpu" else META
        learner = Learner(
            stage,
            heads,
            self.loss,
            self.num_classes,
            self.precision,
            memory=memory,
            host=host,
            memory_trial=True,
            shape=self.shapes.hidden,
        )
        learner.train()
        return learner

    def _reader(self, learner: Learner, frozen: Sequence[Stage]) -> Callable[[slice], torch.Tensor]:
        """Rows of a batch to the stage's input, as ``Source.inputs`` computes it."""
        shape = self.replay.shape if self.replay else self.shapes.input
        at_once = self.replay.rows if self.replay else WRITE_ROWS
        replayed = [materialised(stage).eval() for stage in frozen]

        def read(rows: slice) -> torch.Tensor:
            count = (rows.stop or self.batch_size) - (rows.start or 0)
            stored = torch.empty((count, self.stored_row_bytes), dtype=torch.uint8)
            x = torch.empty((count, *shape))
            del stored  # it is let go of once x is there
            with torch.no_grad(), learner.autocast():
                return replay(replayed, x, at_once).float()

        return read

    def _batch(self, learner: Learner, frozen: Sequence[Stage]) -> Batch:
        mask = learner.mask(0, self.batch_size, self.shapes.input, 0, 0)
        labels = torch.zeros(self.batch_size, dtype=torch.long)
        return Batch(labels, self._reader(learner, frozen), mask)


def weight_bytes(stage: Stage) -> int:
    """Bytes of a stage's weights."""
    return sum(p.numel() * p.element_size() for p in stage.parameters())


def _held(learner: Learner) -> list[torch.Tensor]:
    """The stage's and its heads' weights, and what else they hold."""
    modules = (learner.stage, learner.heads)
    return [each for m in modules for each in (*m.parameters(), *m.buffers())]
