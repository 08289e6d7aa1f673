"""A trial of stages with random rows: whether their outputs can be stored, their state saved."""

from collections.abc import Sequence
from copy import deepcopy

import torch
from torch import Tensor

from greedy.base.errors import UserError, first_line
from greedy.base.seeds import seeded_globally
from greedy.models import Shape, Stage

ROWS = 2
EQUAL = 1e-4  # of the largest output: repeated on a GPU
CLOSE = 2e-2  # another number of rows, computed in half precision


def require_repeatable(stages: Sequence[Stage], row: Shape) -> None:
    """Raises ``UserError`` for a stage that, once it is trained, gives something else for the same
    row ``row`` or beside other rows, or that computes with state that is not in its ``state_dict``.

    Stages are tried as copies, with random rows, and global generators are left as they are.
    Stages on the meta device are not tried, and what fails here fails where it is trained.
    """
    tensors = [tensor for stage in stages for tensor in (*stage.parameters(), *stage.buffers())]
    if any(tensor.is_meta for tensor in tensors):
        return
    device = tensors[0].device
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randn(ROWS, *row, generator=generator).to(device) for _ in range(3)]
    with torch.no_grad(), seeded_globally(0, [device] if device.type == "cuda" else []):
        for stage in stages:
            copied = _copy(stage)
            try:
                alone, outputs = _alone(copied, rows[0]), [copied.eval()(x) for x in rows]
                again, kept = copied(rows[0]), _keeps_its_state(stage, rows)
            except Exception:  # the stage's own
                return
            where = f"stage {stage.number} ({stage.name})"
            if _differ(again, outputs[0], EQUAL):
                raise UserError(
                    f"{where} is random in evaluation mode, too, so that the trained network would "
                    f"give something else for the same image each time: let it draw only if "
                    f"self.training"
                )
            if _differ(alone, outputs[0], CLOSE):
                raise UserError(
                    f"what {where} gives for an image in evaluation mode depends on the others in "
                    f"its batch: let it use statistics that it has learned, as batch norm does"
                )
            if not kept:
                raise UserError(
                    f"{where} computes with numbers that it changes as it trains and that its "
                    f"state_dict lacks, so that they would be lost: register them by "
                    f"register_buffer"
                )
            rows = outputs


def _copy(stage: Stage) -> Stage:
    try:
        return deepcopy(stage)
    except Exception as error:
        raise UserError(
            f"stage {stage.number} ({stage.name}) cannot be copied ({first_line(error)}): use "
            f"weight_norm of torch.nn.utils.parametrizations, not that of torch.nn.utils, and "
            f"prune.remove after pruning"
        ) from error


def _alone(stage: Stage, x: Tensor) -> Tensor:
    """Returns a stage's outputs in evaluation mode for rows that it gets one by one."""
    stage.eval()
    return torch.cat([stage(each) for each in x.split(1)])


def _keeps_its_state(stage: Stage, rows: Sequence[Tensor]) -> bool:
    """Returns whether a copy that has seen batches computes what another one does that has got its
    ``state_dict``."""
    seen, loaded = deepcopy(stage).train(), deepcopy(stage)
    for x in rows[1:]:
        seen(x)
    loaded.load_state_dict(seen.state_dict())
    for training in (False, True):
        torch.manual_seed(0)
        expected = seen.train(training)(rows[0])
        torch.manual_seed(0)
        if _differ(loaded.train(training)(rows[0]), expected, EQUAL):
            return False
    return True


def _differ(given: Tensor, expected: Tensor, tolerance: float) -> bool:
    if given.shape != expected.shape:
        return True
    largest = float(expected.abs().nan_to_num(posinf=0).max())
    return not torch.allclose(given, expected, tolerance, tolerance * largest, equal_nan=True)
