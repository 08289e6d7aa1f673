"""What a stage must be like to be trained. Runs of older versions may have other stages."""

from collections.abc import Sequence
from copy import deepcopy

import torch
from torch import Tensor

from greedy.base.errors import UserError
from greedy.base.torch_private import BATCH_NORMS
from greedy.models import Shape, Stage, require_float32
from greedy.models.shares import sharing


def require_trainable(stage: Stage, row: Shape) -> None:
    """Raises ``UserError`` for a stage that cannot compute with float32 rows of shape ``row``,
    whose output depends on its batch once it is trained, whose weights are complex, or whose state
    is not of tensors alone."""
    where = f"stage {stage.number} ({stage.name})"
    for module in stage.modules():
        if isinstance(module, BATCH_NORMS) and module.running_mean is None:
            raise UserError(
                f"a {type(module).__name__} of {where} keeps no running statistics, so that what a "
                f"trained network gives for an image would depend on the others in its batch: set "
                f"track_running_stats=True, or take nn.GroupNorm"
            )
    if not _computes_float32(stage, row):
        require_float32(stage)
    for name, parameter in stage.named_parameters():
        if parameter.is_complex():
            raise UserError(
                f"{name} of {where} is complex, and optimisers take real numbers: keep what "
                f"torch.view_as_real gives of it, and use view_as_complex in the forward pass"
            )
    for name, value in stage.state_dict().items():
        if not isinstance(value, Tensor):
            raise UserError(
                f"the state of {where} has {name}, which is no tensor and cannot be saved: let "
                f"get_extra_state of that module return a tensor, or do without it"
            )


def require_separate(stages: Sequence[Stage]) -> None:
    """Raises ``UserError`` for stages that share weights or running statistics: each stage is
    trained after the one before is frozen."""
    if found := sharing([stage] for stage in stages):
        first, second = found
        raise UserError(
            f"stage {second.number} ({second.name}) shares weights with stage {first.number} "
            f"({first.name}), which is frozen before it: give each its own, or train all at once "
            f"by --strategy joint or backprop"
        )


@torch.no_grad()
def _computes_float32(stage: Stage, row: Shape) -> bool:
    """Returns whether a stage takes two rows of float32 and returns that, as one that casts them
    itself does."""
    if all(parameter.dtype == torch.float32 for parameter in stage.parameters()):
        return True
    device = next(stage.parameters()).device
    copied = deepcopy(stage).eval()
    try:
        h = copied.hidden(torch.zeros(2, *row, device=device))
        return {h.dtype, copied.pool(h).dtype} == {torch.float32}
    except Exception:  # the module's own
        return False
