"""What one training step of the whole network takes, counted on fake tensors.

Counted are the bytes of weights, gradients, both moments of Adam, the batch and all that comes
between: a real step needs what its operators take while they compute besides.
"""

from collections.abc import Callable, Sequence
from copy import deepcopy
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from greedy.base.errors import UserError
from greedy.base.sizes import format_size
from greedy.losses import Glob, LocalLoss, make_heads
from greedy.losses.strategies import stage_losses
from greedy.memory.choice import Choice, fused_adam, reserved
from greedy.memory.counting import Counter
from greedy.memory.fake import counted, fake_tensors, make_state, materialised
from greedy.memory.peaks import OptimizerFactory
from greedy.models import Stage, StageShapes
from greedy.recipes import Training
from greedy.runs.choices import Mode
from greedy.steps.guard import Guard
from greedy.steps.measuring import measure
from greedy.steps.step import Learner
from greedy.steps.strategies import Strategy, together
from greedy.stores.source import Batch
from greedy.stores.writing import write_batch

MICRO_BATCH = 8  # rows, of the accumulated step
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


def baselines(
    stages: Sequence[Stage],
    shapes: Sequence[StageShapes],
    loss: LocalLoss,
    num_classes: int,
    batch_size: int,
) -> dict[str, int]:
    """The peaks in bytes of steps by other means than ours, named as in ``BASELINES``, for one
    network and batch size, in float32 but for ``backprop_bfloat16``; without a local loss there is
    no ``joint``. The stages stay as they are."""
    count = partial(network_peak, stages, shapes, loss, num_classes, batch_size)
    found = {
        "backprop": count("backprop"),
        "backprop_bfloat16": count("backprop", precision="bfloat16"),
        "backprop_checkpointed": count("backprop", step=_checkpointed),
        "backprop_accumulated": count("backprop", accumulate=-(-batch_size // MICRO_BATCH)),
    }
    return found if isinstance(loss, Glob) else found | {"joint": count("joint")}


def choose_network(
    stages: Sequence[Stage],
    shapes: Sequence[StageShapes],
    loss: LocalLoss,
    num_classes: int,
    training: Training,
    precision: str,
    budget: int | None,
    device_type: str,
    optimizer: OptimizerFactory | None = fused_adam,
) -> Choice:
    """The choice by which a step that trains all stages at once fits a budget of bytes: in its
    plain mode, the only one it has. Raises ``UserError`` where it does not. Without an
    ``optimizer`` its state is in host memory."""
    peak = network_peak(
        stages,
        shapes,
        loss,
        num_classes,
        training.batch_size,
        training.strategy,
        precision=precision,
        accumulate=training.accumulate,
        optimizer=optimizer,
    )
    looking = partial(
        network_peak,
        stages,
        shapes,
        loss,
        num_classes,
        strategy=training.strategy,
        precision=precision,
        optimizer=optimizer,
        step=_measured,
    )
    if training.patience:  # held-out rows are measured a batch at a time
        peak = max(peak, looking(batch_size=training.batch_size))
    peak = reserved(peak, device_type)
    if budget is not None and peak > budget:
        raise UserError(
            f"a step of the whole network takes {format_size(peak)} and the memory budget is "
            f"{format_size(budget)}: train one stage at a time (--strategy greedy), lower "
            f"training.batch_size, or raise --memory-budget"
        )
    test_rows = min(map(write_batch, shapes))
    while budget is not None and test_rows > 1:
        if reserved(looking(batch_size=test_rows), device_type) <= budget:
            break
        test_rows //= 2
    rows = -(-training.batch_size // training.accumulate)
    return Choice(Mode.PLAIN, rows, peak, test_rows)


def network_peak(
    stages: Sequence[Stage],
    shapes: Sequence[StageShapes],
    loss: LocalLoss,
    num_classes: int,
    batch_size: int,
    strategy: str,
    *,
    precision: str = "float32",
    accumulate: int = 1,
    optimizer: OptimizerFactory | None = fused_adam,
    step: Step | None = None,
) -> int:
    """The peak in bytes of a step that trains all stages by a strategy of that name. Without an
    ``optimizer`` its state is in host memory. The stages stay as they are."""
    what = (num_classes, batch_size, strategy, precision, accumulate, optimizer, step or _step)
    return counted(lambda seen: _peak(stages, shapes, seen, *what), loss, "the network")


def _peak(
    stages: Sequence[Stage],
    shapes: Sequence[StageShapes],
    loss: LocalLoss,
    num_classes: int,
    batch_size: int,
    strategy: str,
    precision: str,
    accumulate: int,
    optimizer: OptimizerFactory | None,
    step: Step,
) -> int:
    copies = [deepcopy(stage).to("meta") for stage in stages]
    with fake_tensors(), Counter() as counter:
        learners = [
            _learner(stage, shape, each, num_classes, precision)
            for stage, shape, each in zip(
                copies, shapes, stage_losses(strategy, loss, len(stages)), strict=True
            )
        ]
        trained = together(strategy, learners, accumulate, optimizer or _no_optimizer)
        make_state([p for each in learners for p in each.parameters()], trained.optimizers)
        batch, masks = _batch(learners, shapes, batch_size)
        counter.reset_peak()
        step(trained, batch, masks)
    return counter.peak


class _Unguarded(Guard):
    """Steps whatever the loss is: fake tensors have no numbers to look at."""

    def update(self, optimizer: torch.optim.Optimizer, *what: object) -> None:
        optimizer.step()


def _step(strategy: Strategy, batch: Batch, masks: Sequence[Tensor | None]) -> None:
    strategy.step(batch, masks, _Unguarded(), 0)


def _measured(strategy: Strategy, batch: Batch, masks: Sequence[Tensor | None]) -> None:
    """A look at the test split, beside the gradients of the last step."""
    for parameter in (p for each in strategy.learners for p in each.parameters()):
        parameter.grad = torch.zeros_like(parameter)
    measure(strategy.learners, [batch])


def _checkpointed(strategy: Strategy, batch: Batch, masks: Sequence[Tensor | None]) -> None:
    """Back-propagation that keeps the stages' outputs alone, and computes what lies in a stage
    again in the backward pass."""
    x = batch.inputs()
    for learner, mask in zip(strategy.learners, masks, strict=True):
        x = checkpoint(
            learner.stage,
            x if mask is None else x * mask,
            use_reentrant=False,
            preserve_rng_state=False,
        )
    F.cross_entropy(x, strategy.learners[-1].one_hot(batch.labels)).backward()
    strategy.optimizers[0].step()


def _learner(
    stage: Stage, shape: StageShapes, loss: LocalLoss, num_classes: int, precision: str
) -> Learner:
    """A stage with weights and heads on the device, ready to train."""
    heads = make_heads(loss, shape.hidden, num_classes)
    learner = Learner(materialised(stage), heads, loss, num_classes, precision, rehearsed=True)
    learner.train()
    return learner


def _batch(
    learners: Sequence[Learner], shapes: Sequence[StageShapes], batch_size: int
) -> tuple[Batch, list[Tensor | None]]:
    def read(rows: slice) -> Tensor:
        start, stop, _ = rows.indices(batch_size)
        return torch.zeros((stop - start, *shapes[0].input))

    generator = torch.Generator()
    masks = [
        None
        if (drop := each.stage.dropout) is None
        else drop.mask(batch_size, shape.input, generator)
        for each, shape in zip(learners, shapes, strict=True)
    ]
    return Batch(torch.zeros(batch_size, dtype=torch.long), read), masks


def _no_optimizer(parameters: object) -> torch.optim.Optimizer:
    """Stands for one whose state is not on the device."""
    return torch.optim.SGD([torch.zeros(1, requires_grad=True)])
