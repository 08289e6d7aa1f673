"""One optimiser step of a stage on one batch."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from traceback import clear_frames

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from greedy.base.devices import is_out_of_memory, to_device
from greedy.base.errors import first_line
from greedy.base.heap import release_free_memory
from greedy.base.precision import HALVES, autocast
from greedy.base.seeds import torch_generator
from greedy.base.user_folders import prepare_compiling
from greedy.losses import Features, LocalHeads, LocalLoss
from greedy.models import Shape, Stage
from greedy.runs.choices import Mode, StepMemory
from greedy.steps.exact import ExactStep, put
from greedy.steps.graph import WARM_UP, Gradients, StepGraph
from greedy.steps.guard import Guard
from greedy.steps.parts import Parts, parts_of
from greedy.steps.scaling import LossScale
from greedy.stores.source import Batch


@dataclass
class Learner:
    """A stage with all that exists only while it trains.

    Attributes:
        scale: of the loss, where the precision is float16.
        compiled_rows: of a batch whose step is compiled, in the plain mode; 0 for none. Others, the
            last of an epoch, would have to be compiled once more.
        compiling_failed: why it did.
        graph_rows: of a batch whose gradients, in the plain mode, are launched as a CUDA graph,
            which keeps memory of its own; 0 for none. Numbers are the same.
        memory: how much of a batch a step keeps; becomes smaller where it does not fit.
        smaller: what it becomes, of what its plan has counted; ``None`` if nothing is smaller.
            Without a plan it is the next mode.
        host: where a mode that streams keeps its input.
        rehearsed: only the first two and the last micro-batch are computed, which show what
            memory a step takes.
        shape: of a row of its activation h, by which tokens are told from vectors.
    """

    stage: Stage
    heads: LocalHeads
    loss: LocalLoss
    num_classes: int
    precision: str
    optimizer: torch.optim.Optimizer | None = None
    scale: LossScale | None = None
    compiled_rows: int = 0
    compiling_failed: str = ""
    graph_rows: int = 0
    memory: StepMemory = field(default_factory=StepMemory)
    smaller: Callable[["Learner"], StepMemory | None] | None = None
    host: torch.device = field(default_factory=lambda: torch.device("cpu"))
    rehearsed: bool = False
    shape: Shape = ()
    _compiled: Callable[[Tensor], Features] | None = field(default=None, init=False, repr=False)
    _graph: StepGraph | None = field(default=None, init=False, repr=False)
    _steps: int = field(default=0, init=False, repr=False)  # of graph_rows

    @property
    def device(self) -> torch.device:
        return next(self.stage.parameters()).device

    @property
    def parts(self) -> Parts | None:
        """Encoder, batch norm and activation of a stage of the usual pattern."""
        return parts_of(self.stage, self.heads, self.shape)

    def parameters(self) -> list[nn.Parameter]:
        """The encoder's and the heads' parameters."""
        return [*self.stage.parameters(), *self.heads.parameters()]

    def buffers(self) -> list[Tensor]:
        """What a step changes besides: running statistics."""
        return [*self.stage.buffers(), *self.heads.buffers()]

    def mask(self, seed: int, rows: int, shape: Shape, epoch: int, position: int) -> Tensor | None:
        """The mask of dropout on so many inputs of this shape, named by (seed, stage, step)."""
        if self.stage.dropout is None:
            return None
        generator = torch_generator(seed, "dropout", self.stage.number, epoch, position)
        mask = self.stage.dropout.mask(rows, shape, generator)
        return to_device(mask, self.device)

    def train(self) -> None:
        """Batch statistics are taken and learned from."""
        self.stage.train()
        self.heads.train()

    def eval(self) -> None:
        """Running statistics are used."""
        self.stage.eval()
        self.heads.eval()

    def release(self) -> None:
        """Lets go of what only training needs: gradients, the optimiser with its state, and what
        was compiled."""
        self.optimizer = None
        self.forget_made()
        for parameter in self.parameters():
            parameter.grad = None

    def autocast(self) -> torch.autocast:
        """Lower precision for encoder and heads; features, losses and weights stay float32."""
        return autocast(self.device.type, self.precision)

    def hidden(self, x: Tensor) -> Tensor:
        """h of inputs (B, *shape) on which dropout has been applied."""
        with self.autocast():
            return self.stage.hidden(x)

    def local(self, h: Tensor) -> Features:
        """What the local heads make of h."""
        with self.autocast():
            return self.heads(h)

    def features(self, x: Tensor) -> Features:
        """Features of inputs (B, *shape) on which dropout has been applied."""
        return self.local(self.hidden(x))

    def compiled(self, x: Tensor) -> Features:
        """What ``features`` gives, compiled if it is to be for so many rows."""
        if len(x) != self.compiled_rows:
            return self.features(x)
        if self._compiled is None:
            prepare_compiling()
            torch.compiler.reset()  # of the stages before, whose number is limited
            self._compiled = torch.compile(self.features, dynamic=False)
        return self._compiled(x)

    def recorded(self, x: Tensor, y: Tensor, compute: Gradients) -> StepGraph | None:
        """The CUDA graph that does for such inputs and targets what ``compute`` does, made once
        libraries are warm; ``None`` where there is none."""
        if len(x) != self.graph_rows:
            return None
        self._steps += 1
        if self._graph is None and self._steps > WARM_UP:
            self._graph = StepGraph.of(compute, self.parameters(), x, y)
        return self._graph

    def forget_made(self) -> None:
        """Drops what was compiled, and the graph with its memory."""
        self._graph, self._steps = None, 0
        if self._compiled is not None:
            self._compiled = None
            torch.compiler.reset()

    def one_hot(self, labels: Tensor) -> Tensor:
        """Y: (B,) to (B, classes)."""
        return F.one_hot(labels, self.num_classes).to(next(self.stage.parameters()).dtype)

    def targets(self, labels: Tensor) -> Tensor:
        """What the loss aims at: Y, or what the heads make of it."""
        return self.heads.targets(self.one_hot(labels))

    def slices(self, rows: int) -> list[slice]:
        """The micro-batches of a batch."""
        size = rows if self.memory.mode is Mode.PLAIN else self.memory.micro_batch
        found = [slice(start, min(start + size, rows)) for start in range(0, rows, size)]
        return found if not self.rehearsed or len(found) < 3 else [*found[:2], found[-1]]


def step(
    learner: Learner, batch: Batch, guard: Guard, position: int
) -> tuple[Tensor, Tensor | None]:
    """Trains on one batch, number ``position`` of its epoch, unless loss or gradients are not
    finite.

    Returns the loss, a scalar, and the local classifier's logits (B, classes) or ``None``;
    neither is waited for. Where memory runs out before the optimiser's step, nothing has been
    changed yet, and the gradients are computed again with less; the smallest mode's
    ``torch.OutOfMemoryError`` is raised. The optimiser steps once: if it fails, it may have
    changed some weights, and ``OptimizerFailed`` is raised.
    """
    assert learner.optimizer is not None
    while (done := _try(learner, batch)) is None:
        pass
    loss, logits = done
    guard.update(learner.optimizer, loss, position, learner.parameters(), learner.scale)
    return loss, logits


def _try(learner: Learner, batch: Batch) -> tuple[Tensor, Tensor | None] | None:
    """The gradients, or ``None`` where they took too much memory and a smaller mode is to be
    tried, or could not be compiled. CUDA graphs give way first."""
    before = [buffer.clone() for buffer in learner.buffers()]
    try:
        return gradients(learner, batch)
    except Exception as error:
        if learner.graph_rows:
            learner.graph_rows = 0
        elif is_out_of_memory(error) and (smaller := _smaller(learner, error)):
            learner.memory = smaller
        elif learner.compiled_rows:  # an error of the stage's own will come again
            learner.compiled_rows, learner.compiling_failed = 0, first_line(error)
        else:
            raise
    _let_go(learner)
    for buffer, value in zip(learner.buffers(), before, strict=True):
        buffer.copy_(value)
    torch.manual_seed(torch.initial_seed())  # what draws from it draws the same again
    return None


def _let_go(learner: Learner) -> None:
    """Lets go of what a step leaves on the device."""
    learner.forget_made()
    for parameter in learner.parameters():
        parameter.grad = None
    release_free_memory(learner.device)


def _smaller(learner: Learner, error: Exception) -> StepMemory | None:
    if learner.parts is None:
        return None
    if learner.smaller is None:
        return learner.memory.smaller(learner.device.type)
    clear_frames(error.__traceback__)  # which hold what the step had computed
    _let_go(learner)
    return learner.smaller(learner)


def gradients(learner: Learner, batch: Batch) -> tuple[Tensor, Tensor | None]:
    """Gives every parameter its gradient on a batch, times the loss's scale. Returns loss and
    logits like ``step``."""
    y = learner.targets(batch.labels)
    if learner.memory.mode is Mode.PLAIN:
        return _plain_gradients(learner, batch.inputs(), y)
    parts = learner.parts
    assert parts is not None
    slices = learner.slices(len(batch.labels))
    exact = ExactStep(
        parts,
        learner.loss,
        learner.memory.mode,
        slices,
        _x(learner, batch),
        learner.autocast(),
        learner.scale,
    )
    return exact.gradients(y)


def _plain_gradients(learner: Learner, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor | None]:
    compute = partial(_by_autograd, learner)
    return (learner.recorded(x, y, compute) or compute)(x, y)


def _by_autograd(learner: Learner, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor | None]:
    for parameter in learner.parameters():
        parameter.grad = None
    features = learner.compiled(x)
    loss = learner.loss(features, y)
    (loss if learner.scale is None else learner.scale(loss)).backward()
    return loss.detach(), learner.heads.logits(features)


@torch.no_grad()
def _x(learner: Learner, batch: Batch) -> Tensor:
    """The stage's input, read a micro-batch at a time, in the precision of the encoder."""
    x: Tensor | None = None
    streams = learner.memory.mode.streams
    for rows in learner.slices(len(batch.labels)):
        part = batch.inputs(rows)
        if learner.stage.flatten:
            part = part.flatten(1)
        part = part.to(HALVES.get(learner.precision, part.dtype))
        if streams:
            part = part.to(learner.host)
        pinned = streams and learner.device.type == "cuda"
        x = put(x, len(batch.labels), rows, part, pinned=pinned)
    assert x is not None
    return x
