"""What one step of a stage takes, counted on fake tensors."""

from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from greedy.losses import Features, LocalHeads, LocalLoss
from greedy.memory.counting import Counter
from greedy.models import Shape, Stage, StageShapes
from greedy.source import Batch
from greedy.training.modes import StepMemory
from greedy.training.step import Learner, gradients

CPU, META = torch.device("cpu"), torch.device("meta")

OptimizerFactory = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


@dataclass(frozen=True)
class StepDemand:
    """A stage's step as memory sees it.

    Attributes:
        batch_size: rows of a batch.
        precision: ``float32``, ``bfloat16`` or ``float16``.
        optimizer: makes the stage's optimiser; ``None`` if its state is in host memory.
        device_type: of the device; on ``cpu`` host memory is the device's.
        stored_row_bytes: of a row as the source holds it.
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

    def peak(self, memory: StepMemory) -> int:
        """Bytes on the device at most, in a step with this memory after the first one: weights,
        gradients, optimiser state, the batch, and what is computed from it."""
        try:
            return self._peak(memory)
        except DataDependentOutputException:  # a loss that looks at numbers; there are none
            return replace(self, loss=_Unseen(self.loss))._peak(memory)

    def _peak(self, memory: StepMemory) -> int:
        stage = self._skeleton()
        with FakeTensorMode(), Counter() as counter:
            learner = self._learner(stage, memory)
            counter.add([*learner.stage.state_dict().values(), *learner.heads.parameters()])
            if self.optimizer is not None:
                learner.optimizer = self.optimizer(learner.parameters())
                make_state(learner.parameters(), [learner.optimizer])
            counter.reset_peak()
            gradients(learner, self._batch(learner))
        return counter.peak

    def writing_peak(self, rows: int) -> int:
        """Bytes on the device at most, while the trained stage computes the outputs and the local
        error of so many rows."""
        stage = self._skeleton()
        with FakeTensorMode(), Counter() as counter, torch.no_grad():
            learner = self._learner(stage, StepMemory())
            learner.eval()
            counter.add([*learner.stage.state_dict().values(), *learner.heads.parameters()])
            counter.reset_peak()
            x = self._read(slice(0, rows))
            learner.features(x)
            with learner.autocast():
                learner.stage(x).float()
        return counter.peak

    def flops(self) -> int:
        """Floating-point operations of the plain step, a multiply-add counting 2."""
        stage = self._skeleton()
        with FakeTensorMode(), FlopCounterMode(display=False) as counter:
            learner = self._learner(stage, StepMemory())
            gradients(learner, self._batch(learner))
        return counter.get_total_flops()

    def parameter_bytes(self) -> int:
        """Bytes of weights, gradients and optimiser state."""
        stage = self._skeleton()
        with FakeTensorMode():
            parameters = self._learner(stage, StepMemory()).parameters()
        copies = 2 if self.optimizer is None else 4
        return copies * sum(p.numel() * p.element_size() for p in parameters)

    def _skeleton(self) -> Stage:
        """The stage without its weights; real tensors and fake ones do not mix."""
        return deepcopy(self.stage).to("meta")

    def _learner(self, stage: Stage, memory: StepMemory) -> Learner:
        state = stage.state_dict(keep_vars=True)
        state = {k: torch.empty(v.shape, dtype=v.dtype) for k, v in state.items()}
        stage.load_state_dict(state, assign=True)
        heads = self.loss.heads(self.shapes.hidden, self.num_classes)
        host = CPU if self.device_type == "cpu" else META
        learner = Learner(
            stage,
            heads,
            self.loss,
            self.num_classes,
            self.precision,
            memory=memory,
            host=host,
            rehearsed=True,
        )
        learner.train()
        return learner

    def _read(self, rows: slice) -> torch.Tensor:
        count = (rows.stop or self.batch_size) - (rows.start or 0)
        stored = torch.empty((count, self.stored_row_bytes), dtype=torch.uint8)
        x = torch.empty((count, *self.shapes.input))
        del stored  # it is let go of once x is there
        return x

    def _batch(self, learner: Learner) -> Batch:
        mask = None
        if learner.stage.dropout is not None:
            generator = torch.Generator()
            mask = learner.stage.dropout.mask(self.batch_size, self.shapes.input, generator)
        return Batch(torch.zeros(self.batch_size, dtype=torch.long), self._read, mask)


@dataclass(frozen=True)
class _Unseen:
    """Stands in for a loss, which is computed from small tensors, between its heads."""

    loss: LocalLoss

    @property
    def output_scale(self) -> float:
        return self.loss.output_scale

    def heads(self, shape: Shape, num_classes: int) -> LocalHeads:
        return self.loss.heads(shape, num_classes)

    def __call__(self, features: Features, y: torch.Tensor) -> torch.Tensor:
        return torch.stack([f.mean() for f in features if f is not None]).sum()


def make_state(
    parameters: Sequence[nn.Parameter], optimizers: Sequence[torch.optim.Optimizer]
) -> None:
    """Takes a step, after which the optimisers have their moments."""
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    for optimizer in optimizers:
        optimizer.step()
    for parameter in parameters:
        parameter.grad = None
