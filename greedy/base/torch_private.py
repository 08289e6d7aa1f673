"""Every name of torch that is private: what a new version of torch may change is in this file."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._python_dispatch import _disable_current_modes as without_modes
from torch.utils._pytree import tree_leaves, tree_map

__all__ = [
    "BATCH_NORMS",
    "CONVOLUTIONS",
    "DEPENDS_ON_NUMBERS",
    "DEVICE",
    "DROPOUTS",
    "FakeTensor",
    "FakeTensorMode",
    "POOLS",
    "TorchDispatchMode",
    "clear_cublas_workspaces",
    "function_modes",
    "generators",
    "group_store",
    "has_amx",
    "has_avx512_bf16",
    "has_hooks",
    "keep_casts",
    "is_compiled",
    "is_used_at_once",
    "is_usual_autograd",
    "skips_on_device",
    "storage_key",
    "tree_leaves",
    "tree_map",
    "without_modes",
]

DEVICE = torch.ops.prim.device.default
"""The operator that tells a fake tensor's device."""

CONVOLUTIONS = nn.modules.conv._ConvNd
BATCH_NORMS = nn.modules.batchnorm._BatchNorm
DROPOUTS = nn.modules.dropout._DropoutNd
POOLS = (
    nn.modules.pooling._MaxPoolNd,
    nn.modules.pooling._AvgPoolNd,
    nn.modules.pooling._AdaptiveMaxPoolNd,
    nn.modules.pooling._AdaptiveAvgPoolNd,
)

DEPENDS_ON_NUMBERS = (DataDependentOutputException, DynamicOutputShapeException)
"""Errors of operators on fake tensors whose result depends on numbers."""


def has_amx() -> bool:
    """Returns whether the processor multiplies matrices in bfloat16 in units of their own."""
    return torch.cpu._is_amx_tile_supported()


def has_avx512_bf16() -> bool:
    """Returns whether the processor has vector instructions for bfloat16."""
    return torch.cpu._is_avx512_bf16_supported()


def has_hooks(module: nn.Module) -> bool:
    """Returns whether hooks of a module may change what its forward pass takes or gives."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def is_compiled(module: nn.Module) -> bool:
    """Returns whether a module is one that ``torch.compile`` made."""
    return hasattr(module, "_orig_mod")


def is_used_at_once(parameter: nn.Parameter) -> bool:
    """Returns whether a parameter has a hook that is called once its gradient was added to."""
    return bool(parameter._post_accumulate_grad_hooks)


def generators(device: torch.device) -> list[torch.Generator]:
    """Returns the generators that modules on a device draw from by default, the CPU's first."""
    found = [torch.default_generator]
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        found.append(torch.cuda.default_generators[index])
    if device.type == "mps":
        found.append(torch.mps._get_default_mps_generator())
    return found


def function_modes() -> Callable[[], AbstractContextManager[None]]:
    """Returns what makes a context with the modes of torch's functions that are on here, for a
    backward pass, which torch runs without them."""
    modes = torch.overrides._get_current_function_mode_stack()

    @contextmanager
    def modes_again() -> Iterator[None]:
        with ExitStack() as stack:
            for mode in modes:
                stack.enter_context(mode)
            yield

    return modes_again


def is_usual_autograd() -> bool:
    """Returns whether autograd keeps what functions save and calls their backward passes itself:
    not where ``torch.utils.checkpoint`` saves nothing and computes it again, nor within
    ``torch.func`` and forward-mode differentiation."""
    if torch.compiler.is_compiling():  # which takes them apart
        return True
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    is_transformed = torch._C._are_functorch_transforms_active()
    return hooks is None and not is_transformed and forward_ad._current_level < 0


def group_store() -> dist.Store:
    """Returns the store of words through which the processes of the process group met."""
    return dist.distributed_c10d._get_default_store()


def storage_key(tensor: Tensor) -> int:
    """Returns a number that all tensors over the same storage have in common."""
    return tensor.untyped_storage()._cdata


def skips_on_device(optimizer: torch.optim.Optimizer) -> bool:
    """Returns whether an optimiser skips its step if its attribute ``found_inf``, a tensor on the
    device, is not zero, as fused ones do for ``GradScaler``."""
    return getattr(optimizer, "_step_supports_amp_scaling", False)


def keep_casts() -> None:
    """Lets autocast in this thread, from now on, keep the weights that other threads have cast: the
    cache is one for all threads, and is cleared whenever autocast ends in one of them."""
    torch.autocast_increment_nesting()


def clear_cublas_workspaces() -> None:
    """Frees the workspaces of cuBLAS, which allocates new ones when it needs them."""
    torch._C._cuda_clearCublasWorkspaces()
