"""Where a stage computes, and in which precision."""

import os
import re
import resource
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import psutil
import torch

from greedy.base.errors import UserError

DEVICES = ("auto", "cpu", "cuda", "mps")
PROCESS = Path("/proc/self")  # of Linux, whose status counts in kB; 5 resets the highest memory


def pick_device(name: str) -> torch.device:
    """The device called ``auto``, ``cpu``, ``cuda`` or ``mps``; ``auto`` is the fastest there is.
    Raises ``UserError`` for one this machine lacks."""
    # Blocks that grow in place, if nothing has been taken yet: of fixed ones a third of a small
    # budget was free in pieces that fitted nothing.
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        return torch.device(next((d for d, there in available.items() if there), "cpu"))
    if name not in DEVICES:
        raise UserError(f"{name!r} is not a device: use one of {', '.join(DEVICES)}")
    if not available.get(name, True):
        raise UserError(f"this machine has no usable {name} device: use --device auto or cpu")
    return torch.device(name)


def pick_precision(name: str, device: torch.device) -> str:
    """``auto`` is bfloat16 where the device computes it fast, else float32."""
    if name != "auto":
        return name
    if device.type == "cuda":
        fast = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        fast = device.type == "cpu" and (
            torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
        )
    return "bfloat16" if fast else "float32"


def set_determinism(device: torch.device, wanted: bool) -> None:
    """Whether operators give the same bits whenever they are given the same; of one that cannot
    torch warns. On CUDA convolutions in float32 use TF32 if they need not; matrix products, the
    losses' among them, never do."""
    torch.use_deterministic_algorithms(wanted, warn_only=True)
    if device.type == "cuda":
        # Of cuBLAS, in each thread, before it is first used; 32 MiB on some GPUs else. A step's
        # matrix products are small, and torch calls only the first of the two deterministic.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":16:8" if wanted else ":4096:2:16:8")
        torch.backends.cudnn.deterministic = wanted
        _allow_tf32(not wanted)


def _allow_tf32(allowed: bool) -> None:
    """Sets torch's older switch, which sets the newer ones of torch 2.9 too and can still be read
    by others; torch 2.9 to 2.11 advise against it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Please use the new API settings to control TF32")
        torch.backends.cudnn.allow_tf32 = allowed


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out. CUDA's allocator has one of its own; the CPU's,
    MPS' and CUDA's libraries say it in words."""
    words = (
        "can't allocate memory",
        "CUDA error: out of memory",
        "CUBLAS_STATUS_ALLOC_FAILED",
        "CUDNN_STATUS_ALLOC_FAILED",
        "MPS backend out of memory",
    )
    said = isinstance(error, RuntimeError) and any(each in str(error) for each in words)
    return said or isinstance(error, torch.OutOfMemoryError | MemoryError)


def available_memory() -> int:
    """Bytes of main memory that can be taken without swapping."""
    return psutil.virtual_memory().available


def free_memory(device: torch.device) -> int:
    """Bytes that can be taken on a device now, within what this process may take of it."""
    if device.type != "cuda":
        return available_memory()
    free, total = torch.cuda.mem_get_info(device)
    allowed = int(torch.cuda.get_per_process_memory_fraction(device.index) * total)
    can_be = min(free + torch.cuda.memory_reserved(device), allowed)
    return max(0, can_be - torch.cuda.memory_allocated(device))


@contextmanager
def memory_limited(device: torch.device, budget: int | None) -> Iterator[None]:
    """Inside, CUDA's allocator takes at most a budget of bytes, as on a card with no more. Other
    devices have no such limit."""
    if device.type != "cuda" or budget is None:
        yield
        return
    before = torch.cuda.get_per_process_memory_fraction(device.index)
    total = torch.cuda.get_device_properties(device).total_memory
    torch.cuda.set_per_process_memory_fraction(min(before, budget / total), device.index)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(before, device.index)


def peak_memory(device: torch.device) -> int:
    """Bytes: on CUDA the most that the allocator took of the device since ``reset_peak_memory``,
    else the process's highest resident memory, also since then where the system is Linux."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    status = PROCESS / "status"
    text = status.read_text(encoding="utf-8") if status.is_file() else ""
    if found := re.search(r"^VmHWM:\s*(\d+) kB$", text, re.MULTILINE):
        return 1024 * int(found[1])
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def reset_peak_memory(device: torch.device) -> None:
    """``peak_memory`` is that of what follows. On CUDA, what is free in the allocator goes back to
    the device."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    elif PROCESS.is_dir():
        with suppress(OSError):  # not everywhere may it be written
            (PROCESS / "clear_refs").write_text("5", encoding="ascii")


def give_back_workspaces() -> None:
    """cuBLAS lets go of its workspaces on CUDA, and takes others when it needs them."""
    torch._C._cuda_clearCublasWorkspaces()


def describe(device: torch.device) -> str:
    """The device in words, for records."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {os.cpu_count()} cores"


@contextmanager
def full_float32() -> Iterator[None]:
    """Inside, convolutions on CUDA compute float32 in float32, without TF32. Torch's older switch
    can always be set, but not read where a user has set the newer ones, of torch 2.9."""
    cudnn = torch.backends.cudnn
    newer = (cudnn.conv, cudnn.rnn) if hasattr(cudnn, "conv") else ()
    before = [each.fp32_precision for each in newer]
    allowed = "tf32" in before if newer else cudnn.allow_tf32
    _allow_tf32(False)
    try:
        yield
    finally:
        _allow_tf32(allowed)
        for each, precision in zip(newer, before, strict=True):
            each.fp32_precision = precision


def laid_out(values: torch.Tensor) -> torch.Tensor:
    """Feature maps (B, C, H, W), or a convolution's weight, as they are best laid out where they
    are: on CUDA channels-last, which cuDNN else makes copies of."""
    if not values.is_cuda or values.dim() != 4:
        return values
    return values.contiguous(memory_format=torch.channels_last)


def to_device(values: np.ndarray | torch.Tensor, device: torch.device) -> torch.Tensor:
    """An array or tensor there, integers staying integers on the way. On CUDA nothing waits for
    the copy, which is from page-locked memory."""
    here = torch.from_numpy(values) if isinstance(values, np.ndarray) else values
    if device.type == "cuda" and not here.is_pinned():
        here = here.pin_memory()
    return here.to(device, non_blocking=True)
