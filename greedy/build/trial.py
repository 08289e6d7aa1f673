"""A trial of stages and losses with random rows: whether what they learn can be saved."""

from collections.abc import Sequence
from copy import deepcopy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from greedy.base.errors import UserError, first_line
from greedy.base.seeds import seeded_globally
from greedy.base.torch_private import tree_leaves
from greedy.losses import LocalLoss
from greedy.losses.local import make_heads
from greedy.models import Shape, Stage

ROWS, LOSS_ROWS = 2, 8
# How far outputs may differ, as a share of the largest: threads may add in another order, and half
# precision may round other numbers of rows otherwise.
EQUAL, CLOSE = 1e-4, 2e-2


def can_be_tried(stages: Sequence[Stage]) -> bool:
    """Returns whether stages have numbers, as those on the meta device have not."""
    tensors = (tensor for stage in stages for tensor in (*stage.parameters(), *stage.buffers()))
    return not any(tensor.is_meta for tensor in tensors)


def require_repeatable(stages: Sequence[Stage], shape: Shape) -> None:
    """Raises ``UserError`` for a stage that, once it is trained, gives something else for the same
    row or beside other rows, or that computes with state that is not in its ``state_dict``.

    Stages are tried as copies on the CPU, with random rows of ``shape``, and global generators are
    left as they are. What a stage cannot compute there, such as a single row, is not tried; nor are
    stages that memory has no room for.
    """
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(ROWS, *shape, generator=generator) for _ in range(3)]
    with torch.no_grad(), seeded_globally(0):
        for stage in stages:
            try:
                copied = _copy(stage)
                outputs = [copied(batch) for batch in batches]
            except UserError:
                raise
            except Exception:  # the stage's own, which training meets, too
                return
            for check in (_require_not_random, _require_alone, _require_state):
                try:
                    check(copied, batches, outputs[0])
                except UserError:
                    raise
                except Exception:  # the stage's own
                    copied = _copy(stage)
            batches = outputs


def require_resumable(loss: LocalLoss, hidden: Shape, classes: int) -> None:
    """Raises ``UserError`` for a local loss of a user's that computes with numbers that no
    checkpoint has: it gives something else for the same features once it was computed before, or
    its heads have state that is not in their ``state_dict``.

    It is tried on the CPU with random activations h of shape ``hidden`` a row, and global
    generators are left as they are. What it cannot compute there is not tried.
    """
    if type(loss).__module__.startswith("greedy."):
        return
    name = type(loss).__name__
    try:
        with seeded_globally(0):
            heads = make_heads(loss, hidden, classes)
            batches = [torch.randn(LOSS_ROWS, *hidden) for _ in range(3)]
            y = heads.targets(F.one_hot(torch.arange(LOSS_ROWS) % classes, classes).float())
        features, values = heads(batches[0]), []
        for _ in range(3):
            with seeded_globally(0):
                values.append(loss(features, y).detach())
        if any(_differ(value, values[0], EQUAL) for value in values[1:]):
            raise UserError(
                f"the loss {name} gives something else for the same features each time, from "
                f"numbers of its own that a resumed training would not have: let it depend on "
                f"features and targets alone"
            )
        with torch.no_grad():
            _require_state_dict(heads, batches, f"one of the heads of {name}")
    except UserError:
        raise
    except Exception:  # the loss's own, which training meets, too
        return


def _copy(stage: Stage) -> Stage:
    try:
        return deepcopy(stage).cpu().eval()
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise UserError(
            f"{_name(stage)} cannot be copied ({first_line(error)}): use for instance weight_norm "
            f"of torch.nn.utils.parametrizations, not that of torch.nn.utils, and prune.remove "
            f"after pruning"
        ) from error


def _require_not_random(stage: Stage, batches: Sequence[Tensor], output: Tensor) -> None:
    if _differ(stage(batches[0]), output, EQUAL):
        raise UserError(
            f"{_name(stage)} is random in evaluation mode, too, so that the trained network would "
            f"give something else for the same image each time: let it draw only if self.training"
        )


def _require_alone(stage: Stage, batches: Sequence[Tensor], output: Tensor) -> None:
    alone = torch.cat([stage(row) for row in batches[0].split(1)])
    if _differ(alone, output, CLOSE):
        raise UserError(
            f"what {_name(stage)} gives for an image in evaluation mode depends on the others in "
            f"its batch: let it use statistics that it has learned, as batch norm does"
        )


def _require_state(stage: Stage, batches: Sequence[Tensor], _: Tensor) -> None:
    _require_state_dict(stage, batches, _name(stage))


def _require_state_dict(module: nn.Module, batches: Sequence[Tensor], name: str) -> None:
    """Compares a module, once it has seen batches, with a copy that has only its state."""
    loaded = deepcopy(module)
    module.train()
    for batch in batches[1:]:
        module(batch)
    loaded.load_state_dict(module.state_dict())
    for training in (False, True):
        with seeded_globally(0):
            expected = tree_leaves(module.train(training)(batches[0]))
        with seeded_globally(0):
            given = tree_leaves(loaded.train(training)(batches[0]))
        pairs = zip(given, expected, strict=True)
        if any(_differ(one, other, EQUAL) for one, other in pairs if one is not None):
            raise UserError(
                f"{name} computes with numbers that it changes as it trains and that its "
                f"state_dict lacks, so that they would be lost: register them by register_buffer"
            )


def _differ(given: Tensor, expected: Tensor, tolerance: float) -> bool:
    if given.shape != expected.shape:
        return True
    largest = float(expected.abs().nan_to_num(posinf=0).max())
    return not torch.allclose(given, expected, tolerance, tolerance * largest, equal_nan=True)


def _name(stage: Stage) -> str:
    return f"stage {stage.number} ({stage.name})"
