"""What one training step of the whole network would take by other means.

Each function is one step on one batch as people would write it. Counted on fake tensors are the
bytes of weights, gradients, both moments of Adam, the batch and all that comes between: a real
step needs what its operators take while they compute besides.
"""

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import Adam, Optimizer
from torch.utils.checkpoint import checkpoint

from greedy.losses import LocalHeads, LocalLoss, Output
from greedy.memory.counting import Counter
from greedy.models import Stage, StageShapes

MICRO_BATCH = 8  # rows, of the accumulated step
SHOWN = 2  # micro-batches that are counted: more do not raise the peak


@dataclass(frozen=True)
class Network:
    """A network on fake tensors, with all that trains it.

    Attributes:
        stages: of the network, which is nothing but them.
        heads: the local losses' heads and what they compute, one a stage; empty where the
            network is trained from its end.
        optimizers: one for all parameters, or one a stage with its heads.
    """

    stages: Sequence[Stage]
    heads: Sequence[tuple[LocalHeads, LocalLoss]]
    optimizers: Sequence[Optimizer]


def baselines(
    stages: Sequence[Stage],
    shapes: Sequence[StageShapes],
    loss: LocalLoss,
    num_classes: int,
    batch_size: int,
) -> dict[str, int]:
    """The peaks in bytes of every step below, by its name, for one network and batch size. In
    float32 but for ``backprop_bfloat16``. The stages stay as they are."""
    count = partial(_count, stages, shapes, num_classes, batch_size)
    return {
        "backprop": count(backprop),
        "backprop_bfloat16": count(backprop_bfloat16),
        "backprop_checkpointed": count(backprop_checkpointed),
        "backprop_accumulated": count(backprop_accumulated),
        "joint": count(joint, loss),
    }


def backprop(network: Network, x: Tensor, y: Tensor) -> None:
    """End to end: every activation is kept until the backward pass has used it."""
    (optimizer,) = network.optimizers
    optimizer.zero_grad()
    F.cross_entropy(_forward(network, x), y).backward()
    optimizer.step()


def backprop_bfloat16(network: Network, x: Tensor, y: Tensor) -> None:
    """End to end under autocast, the weights in float32."""
    (optimizer,) = network.optimizers
    optimizer.zero_grad()
    with torch.autocast("cpu", torch.bfloat16):
        logits = _forward(network, x)
    F.cross_entropy(logits.float(), y).backward()
    optimizer.step()


def backprop_checkpointed(network: Network, x: Tensor, y: Tensor) -> None:
    """End to end; only the stages' outputs are kept, and what lies in a stage is computed again
    in the backward pass."""
    (optimizer,) = network.optimizers
    optimizer.zero_grad()
    for stage in network.stages:
        x = checkpoint(stage, _dropped(stage, x), use_reentrant=False, preserve_rng_state=False)
    F.cross_entropy(x, y).backward()
    optimizer.step()


def backprop_accumulated(network: Network, x: Tensor, y: Tensor) -> None:
    """End to end, the gradients added up over micro-batches. Batch norm then sees a micro-batch
    alone: these are not the batch's gradients."""
    (optimizer,) = network.optimizers
    optimizer.zero_grad()
    parts = list(zip(x.split(MICRO_BATCH), y.split(MICRO_BATCH), strict=True))
    for rows, labels in parts[:SHOWN]:
        (F.cross_entropy(_forward(network, rows), labels) / len(parts)).backward()
    optimizer.step()


def joint(network: Network, x: Tensor, y: Tensor) -> None:
    """Local training of all stages at once, as the authors published it: each stage steps on its
    own loss before the next one is computed. Every stage has its heads, gradients and moments."""
    for stage, (heads, loss), optimizer in zip(
        network.stages, network.heads, network.optimizers, strict=True
    ):
        x = _local_step(stage, heads, loss, optimizer, _dropped(stage, x), y)


def _local_step(
    stage: Stage, heads: LocalHeads, loss: LocalLoss, optimizer: Optimizer, x: Tensor, y: Tensor
) -> Tensor:
    h = stage.hidden(x)
    loss(heads(h), heads.targets(y)).backward()
    optimizer.step()
    optimizer.zero_grad()
    return stage.pool(h.detach())


def _count(
    stages: Sequence[Stage],
    shapes: Sequence[StageShapes],
    num_classes: int,
    batch_size: int,
    step: Callable[[Network, Tensor, Tensor], None],
    loss: LocalLoss | None = None,
) -> int:
    """The peak in bytes of a step, with local losses if one is given."""
    copies = [deepcopy(stage).to("meta").train() for stage in stages]
    with FakeTensorMode(), Counter() as counter:
        network = _materialised(copies, shapes, num_classes, loss)
        x = torch.zeros(batch_size, *shapes[0].input)
        y = torch.zeros(batch_size, num_classes)  # one-hot
        counter.reset_peak()
        step(network, x, y)
    return counter.peak


def _materialised(
    stages: list[Stage], shapes: Sequence[StageShapes], num_classes: int, loss: LocalLoss | None
) -> Network:
    """The network with weights on the device and Adam's moments."""
    heads: list[tuple[LocalHeads, LocalLoss]] = []
    for stage, shape in zip(stages, shapes, strict=True):
        state = stage.state_dict(keep_vars=True)
        state = {k: torch.zeros(v.shape, dtype=v.dtype) for k, v in state.items()}
        stage.load_state_dict(state, assign=True)
        if loss is not None:
            local = Output(loss.output_scale) if stage is stages[-1] else loss
            heads.append((local.heads(shape.hidden, num_classes), local))
    if loss is None:
        return Network(stages, heads, [_adam(nn.ModuleList(stages))])
    trained = (nn.ModuleList((stage, head)) for stage, (head, _) in zip(stages, heads, strict=True))
    return Network(stages, heads, [_adam(modules) for modules in trained])


def _adam(module: nn.Module) -> Optimizer:
    """Adam, its moments made."""
    optimizer = Adam(module.parameters(), fused=True)
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


def _forward(network: Network, x: Tensor) -> Tensor:
    for stage in network.stages:
        x = stage(_dropped(stage, x))
    return x


def _dropped(stage: Stage, x: Tensor) -> Tensor:
    if stage.dropout is None:
        return x
    drop = F.dropout2d if stage.dropout.channels else F.dropout
    return drop(x, stage.dropout.rate)
