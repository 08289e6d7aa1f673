"""The optimiser step of a stage on one batch."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property, partial
from traceback import clear_frames

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from greedy.base.devices import is_out_of_memory, to_device
from greedy.base.errors import TrainingError, first_line
from greedy.base.heap import release_free_memory
from greedy.base.precision import HALVES, autocast, widened
from greedy.base.ranks import Shares
from greedy.base.seeds import torch_generator
from greedy.base.user_folders import prepare_compiling
from greedy.exact.rows import write_rows
from greedy.exact.schedule import Schedule
from greedy.losses import Features, LocalHeads, LocalLoss
from greedy.models import Shape, Stage
from greedy.models.lean import Layer
from greedy.runs.choices import Mode, StepMemory
from greedy.steps.blocks import BlockStep, StageWithHeads
from greedy.steps.exact import ExactStep
from greedy.steps.graph import WARM_UP, Gradients, StepGraph
from greedy.steps.guard import Guard
from greedy.steps.optimizers import undecayed
from greedy.steps.parts import SingleLayer, parts_of
from greedy.steps.recordable import require_recordable
from greedy.steps.scaling import LossScale
from greedy.steps.shared import SharedNorms, gradients_added, whole_features
from greedy.steps.unfolded import Unfolded
from greedy.stores.source import Batch


@dataclass
class Learner:
    """A stage with everything that exists only while it trains.

    Attributes:
        stage: the stage.
        heads: its local heads.
        loss: its local loss.
        num_classes: the number of classes.
        precision: ``float32``, ``bfloat16`` or ``float16``.
        optimizer: the optimiser of stage and heads.
        scale: the factor on the loss, in float16 only.
        compiled_rows: the size of the batches whose step is compiled in the plain mode; 0 for
            none. Other batches, the last of an epoch, would have to be compiled once more.
        compiling_failed: why compiling failed; empty if it did not.
        graph_rows: the size of the batches whose gradients are launched as a CUDA graph in the
            plain mode; 0 for none. A graph keeps memory, and gives the same numbers.
        unfolds: whether convolutions of small maps are computed as matrix products.
        memory: the memory mode of a step; replaced by a smaller one if memory runs out.
        smaller: chooses that smaller one from what the plan has counted; returns ``None`` if
            nothing is smaller. Without it the next mode is taken.
        host: the device where a mode that streams keeps its input.
        memory_trial: whether only the first two micro-batches are computed, which show how much
            memory a step takes.
        shape: the shape of a row of its activation h, which distinguishes tokens (T, C) from
            vectors (F,).
        schedule: the passes of a block's micro-batched step, once one has learned them.
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
    unfolds: bool = False
    memory: StepMemory = field(default_factory=StepMemory)
    smaller: Callable[["Learner"], StepMemory | None] | None = None
    host: torch.device = field(default_factory=lambda: torch.device("cpu"))
    memory_trial: bool = False
    shape: Shape = ()
    schedule: Schedule | None = field(default=None, init=False, repr=False)
    _compiled: Callable[[Tensor], Features] | None = field(default=None, init=False, repr=False)
    _graph: StepGraph | None = field(default=None, init=False, repr=False)
    _steps: int = field(default=0, init=False, repr=False)  # with graph_rows rows

    @property
    def device(self) -> torch.device:
        """The device of the stage's weights."""
        return next(self.stage.parameters()).device

    @cached_property
    def parts(self) -> SingleLayer | None:
        """The parts of a stage of a single layer, ``None`` for any other stage."""
        return parts_of(self.stage, self.heads, self.shape)

    def parameters(self) -> list[nn.Parameter]:
        """Returns the encoder's and the heads' parameters."""
        return [*self.stage.parameters(), *self.heads.parameters()]

    def undecayed(self) -> set[nn.Parameter]:
        """Returns the parameters that weight decay leaves alone, see
        ``greedy.steps.optimizers.undecayed``."""
        return undecayed((self.stage, self.heads))

    def buffers(self) -> list[Tensor]:
        """Returns the buffers of encoder and heads, such as running statistics, which a step also
        changes."""
        return [*self.stage.buffers(), *self.heads.buffers()]

    def mask(self, seed: int, rows: int, shape: Shape, epoch: int, position: int) -> Tensor | None:
        """Draws the dropout mask for ``rows`` inputs of a shape, from the stream of random numbers
        that seed, stage, epoch and position name; returns ``None`` without dropout."""
        if self.stage.dropout is None:
            return None
        generator = torch_generator(seed, "dropout", self.stage.number, epoch, position)
        mask = self.stage.dropout.mask(rows, shape, generator)
        return to_device(mask, self.device)

    def train(self) -> None:
        """Switches to training: batch statistics, from which the running ones are updated."""
        self.stage.train()
        self.heads.train()

    def eval(self) -> None:
        """Switches to evaluation: running statistics."""
        self.stage.eval()
        self.heads.eval()

    def release(self) -> None:
        """Frees what only training needs: gradients, the optimiser with its state, and compiled
        code."""
        self.optimizer = None
        self.drop_compiled()
        for parameter in self.parameters():
            parameter.grad = None

    def autocast(self) -> torch.autocast:
        """Returns the context in which encoder and heads compute; features, losses and weights stay
        float32."""
        return autocast(self.device.type, self.precision)

    def hidden(self, x: Tensor) -> Tensor:
        """Computes h from inputs (B, *shape), dropout applied."""
        with self.autocast():
            return self.stage.hidden(x)

    def local(self, h: Tensor) -> Features:
        """Computes the local heads' features of h (B, ...)."""
        with self.autocast():
            return self.heads(h)

    def features(self, x: Tensor) -> Features:
        """Computes the features of inputs (B, *shape), dropout applied."""
        return self.local(self.hidden(x))

    def compiled(self, x: Tensor) -> Features:
        """Computes ``features(x)``, compiled if the batch has ``compiled_rows`` rows."""
        if len(x) != self.compiled_rows:
            return self.features(x)
        if self._compiled is None:
            prepare_compiling()
            torch.compiler.reset()  # drops those of earlier stages, whose number is limited
            self._compiled = torch.compile(self.features, dynamic=False)
        return self._compiled(x)

    def recorded(self, x: Tensor, y: Tensor, compute: Gradients) -> StepGraph | None:
        """Returns the CUDA graph that replays ``compute``, recorded after ``WARM_UP`` steps;
        ``None`` before that, and unless the batch has ``graph_rows`` rows."""
        if len(x) != self.graph_rows:
            return None
        self._steps += 1
        if self._graph is None and self._steps > WARM_UP:
            require_recordable(compute, x, y, self.buffers)
            self._graph = StepGraph.of(compute, self.parameters(), x, y)
        return self._graph

    @property
    def has_graph(self) -> bool:
        """Whether a step is recorded, whose memory is reserved."""
        return self._graph is not None

    def drop_graph(self) -> None:
        """Drops the CUDA graph with its memory pool, which has the gradients, and records no
        other."""
        self._graph, self.graph_rows = None, 0
        for parameter in self.parameters():
            parameter.grad = None
        release_free_memory(self.device)

    def drop_compiled(self) -> None:
        """Drops the compiled function and the CUDA graph with its memory pool."""
        self._graph, self._steps = None, 0
        if self._compiled is not None:
            self._compiled = None
            torch.compiler.reset()

    def one_hot(self, labels: Tensor) -> Tensor:
        """Returns labels (B,) as Y (B, classes), in the type of the weights or in float32."""
        y = F.one_hot(labels, self.num_classes)
        return widened(y.to(next(self.stage.parameters()).dtype))

    def targets(self, batch: Batch) -> Tensor:
        """Returns the targets of the loss for a batch: Y, whose rows may be mixed, or what the
        heads map it to."""
        y = self.one_hot(batch.labels)
        return self.heads.targets(y if batch.mixture is None else batch.mixture.whole(y))

    def slices(self, rows: int) -> list[slice]:
        """Returns the rows of each micro-batch of a batch."""
        slices = self.memory.slices(rows)
        return slices[:2] if self.memory_trial else slices


def step(
    learner: Learner, batch: Batch, guard: Guard, position: int
) -> tuple[Tensor, Tensor | None]:
    """Trains on one batch, number ``position`` of its epoch, unless loss or gradients are not
    finite.

    If memory runs out before the optimiser's step, nothing has changed yet, and the gradients are
    computed again in a smaller memory mode. The optimiser's step is never repeated.

    Returns:
        The loss, a scalar, and the local classifier's logits (B, classes) or ``None``. Neither is
        waited for.

    Raises:
        torch.OutOfMemoryError: no smaller mode is left.
        OptimizerFailed: the optimiser failed, and may have changed some of the weights.
    """
    assert learner.optimizer is not None
    while (result := _try(learner, batch)) is None:
        pass
    loss, logits = result
    guard.update(learner.optimizer, loss, position, learner.parameters(), learner.scale)
    return loss, logits


def _try(learner: Learner, batch: Batch) -> tuple[Tensor, Tensor | None] | None:
    """Computes the gradients. Returns ``None`` if that failed and is to be tried again: without the
    CUDA graph, in a smaller memory mode, or not compiled, in this order."""
    before = [buffer.clone() for buffer in learner.buffers()]
    try:
        return gradients(learner, batch)
    except Exception as error:
        if batch.shares is not None:
            raise _of_one_process(error) from error
        if learner.graph_rows:
            learner.graph_rows = 0
        elif is_out_of_memory(error) and (smaller := _smaller(learner, error)):
            learner.memory = smaller
        elif learner.compiled_rows:  # an error that is the stage's will be raised again
            learner.compiled_rows, learner.compiling_failed = 0, first_line(error)
        else:
            raise
    _free_failed_step(learner)
    for buffer, value in zip(learner.buffers(), before, strict=True):
        buffer.copy_(value)
    torch.manual_seed(torch.initial_seed())  # so that the same numbers are drawn again
    return None


def _of_one_process(error: Exception) -> Exception:
    """Returns the error to raise for a step that failed in one of several processes, which cannot
    repeat it alone."""
    if not is_out_of_memory(error):
        return error
    return TrainingError(
        "memory ran out in one of the processes that train together: give a smaller "
        "--memory-budget, and the same command resumes from the last checkpoint"
    )


def _free_failed_step(learner: Learner) -> None:
    """Frees what a failed step left on the device."""
    learner.drop_compiled()
    for parameter in learner.parameters():
        parameter.grad = None
    release_free_memory(learner.device)


def _smaller(learner: Learner, error: Exception) -> StepMemory | None:
    if learner.smaller is None:
        usual = learner.parts is not None  # whether other stages have modes the planner knows
        return learner.memory.smaller(learner.device.type) if usual else None
    clear_frames(error.__traceback__)  # they hold what the step had computed
    _free_failed_step(learner)
    return learner.smaller(learner)


def gradients(learner: Learner, batch: Batch) -> tuple[Tensor, Tensor | None]:
    """Computes the gradients of a batch's loss, times its scale, into every parameter's ``grad``.
    Returns loss and logits as ``step`` does."""
    with Unfolded() if learner.unfolds else nullcontext():
        return _gradients(learner, batch, learner.targets(batch))


def _gradients(learner: Learner, batch: Batch, y: Tensor) -> tuple[Tensor, Tensor | None]:
    if learner.memory.mode is Mode.PLAIN:
        return _plain_gradients(learner, batch, y)
    if learner.parts is None:
        return _block_gradients(learner, batch, y)
    exact = ExactStep(
        learner.parts,
        learner.loss,
        learner.memory.mode,
        learner.slices(batch.rows),
        _load_input(learner, batch),
        learner.autocast(),
        learner.scale,
        batch.shares,
    )
    return exact.gradients(y)


def _block_gradients(learner: Learner, batch: Batch, y: Tensor) -> tuple[Tensor, Tensor | None]:
    block = BlockStep(
        StageWithHeads(learner.stage, learner.heads, learner.autocast()),
        learner.loss,
        learner.memory.mode,
        learner.slices(batch.rows),
        _load_input(learner, batch),
        learner.device,
        learner.scale,
        learner.schedule,
        learner.memory_trial,
        batch.shares,
    )
    result = block.gradients(y)
    learner.schedule = block.schedule
    return result


def _plain_gradients(learner: Learner, batch: Batch, y: Tensor) -> tuple[Tensor, Tensor | None]:
    x = batch.inputs()
    if batch.shares is not None:
        return _shared_gradients(learner, x, y, batch.shares)
    compute = partial(_by_autograd, learner)
    return (learner.recorded(x, y, compute) or compute)(x, y)


def _shared_gradients(
    learner: Learner, x: Tensor, y: Tensor, shares: Shares
) -> tuple[Tensor, Tensor | None]:
    for parameter in learner.parameters():
        parameter.grad = None
    with SharedNorms(shares):
        features = whole_features(learner.features(x), shares)
    loss = learner.loss(features, y)
    with gradients_added(learner.parameters(), shares):
        (loss if learner.scale is None else learner.scale(loss)).backward()
    return loss.detach(), learner.heads.logits(features)


def _by_autograd(learner: Learner, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor | None]:
    for parameter in learner.parameters():
        parameter.grad = None
    features = learner.compiled(x)
    loss = learner.loss(features, y)
    (loss if learner.scale is None else learner.scale(loss)).backward()
    return loss.detach(), learner.heads.logits(features)


@torch.no_grad()
def _load_input(learner: Learner, batch: Batch) -> Tensor:
    """Returns the stage's input for a batch, computed a micro-batch at a time, in the precision of
    an encoder, on the host if the mode streams it."""
    x: Tensor | None = None
    streams = learner.memory.mode.streams
    for rows in learner.slices(batch.rows):
        part = learner.stage.arranged(batch.inputs(rows))
        if isinstance(learner.stage.layer[0], Layer):  # which alone reads x, in that precision
            part = part.to(HALVES.get(learner.precision, part.dtype))
        if streams:
            part = part.to(learner.host)
        pinned = streams and learner.device.type == "cuda"
        x = write_rows(x, batch.rows, rows, part, pinned=pinned)
    assert x is not None
    return x
