"""What hides a module's batch norms, or acts on gradients before they are complete."""

import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from greedy.base.errors import UserError
from greedy.base.torch_private import is_compiled, is_used_at_once

WRAPPERS = (torch.jit.ScriptModule, DataParallel, DistributedDataParallel)


def require_supported(module: nn.Module, micro_batch: int) -> None:
    """Raises ``UserError`` for a module whose batch norms cannot be seen, for parameters that want
    their gradient at once, and for a micro-batch without rows."""
    if micro_batch < 1:
        raise UserError(f"micro_batch is {micro_batch} but must be at least 1")
    for part in module.modules():
        if isinstance(part, WRAPPERS) or is_compiled(part):
            raise UserError(
                f"what a {type(part).__name__} computes cannot be taken apart: give the module "
                f"from which it was made"
            )
        if isinstance(part, nn.SyncBatchNorm) and torch.distributed.is_initialized():
            raise UserError(
                "SyncBatchNorm takes its statistics from several processes: use BatchNorm2d, and "
                "one process"
            )
    if any(map(is_used_at_once, module.parameters())):
        raise UserError(
            "a parameter has a hook that waits for its gradient, which is complete after the last "
            "micro-batch alone: remove the hook"
        )
