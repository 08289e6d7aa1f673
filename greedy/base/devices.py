"""The devices that stages compute on: choice, precision, memory, transfers."""

import os
import re
import resource
import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import numpy as np
import psutil
import torch

from greedy.base.errors import UserError
from greedy.base.torch_private import has_amx, has_avx512_bf16

DEVICES = ("auto", "cpu", "cuda", "mps")
PROCESS = Path("/proc/self")  # Linux; writing 5 to its clear_refs resets the peak


def pick_device(name: str) -> torch.device:
    """Returns the device called ``auto``, ``cpu``, ``cuda`` or ``mps``; ``auto`` is the fastest one
    available. Raises ``UserError`` for a device that this machine lacks."""
    # Segments that grow in place, set before the first allocation: with fixed ones a third of a
    # small budget was lost to fragmentation.
    if "PYTORCH_ALLOC_CONF" not in os.environ:  # the newer name of the same setting
        os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name == "auto":
        return torch.device(next((name for name, usable in available.items() if usable), "cpu"))
    if name not in DEVICES:
        raise UserError(f"{name!r} is not a device: use one of {', '.join(DEVICES)}")
    if not available.get(name, True):
        raise UserError(f"this machine has no usable {name} device: use --device auto or cpu")
    return torch.device(name)


def pick_refresh_device(
    name: str | None, training: torch.device, *, absent: bool = False
) -> torch.device | None:
    """Returns the device that draws new views beside the one that trains: ``cpu``, ``mps``,
    ``cuda`` or one of several GPUs, such as ``cuda:1``.

    Args:
        name: of the device; ``None`` for none.
        training: the device that trains.
        absent: whether a GPU need not be there.

    Raises:
        UserError: there is no such device, or it is the GPU that trains.
    """
    if name is None:
        return None
    if re.fullmatch(r"cpu|mps|cuda(:\d{1,2})?", name) is None:
        raise UserError(
            f"{name!r} is no device to draw views on: use cpu, mps, cuda, or of several GPUs the "
            f"number, such as cuda:1"
        )
    device = _numbered(torch.device(name))
    if not _is_usable(device) and not (absent and device.type == "cuda"):
        raise UserError(f"this machine has no usable {name} device: give --refresh-device another")
    if device.type != "cpu" and device == _numbered(training):
        raise UserError(
            f"{name} is the device that trains: give --refresh-device another, or leave it out"
        )
    return device


def _is_usable(device: torch.device) -> bool:
    if device.type == "cuda":
        return (device.index or 0) < torch.cuda.device_count()
    return device.type == "cpu" or torch.backends.mps.is_available()


def _numbered(device: torch.device) -> torch.device:
    """Returns a device with the number that torch gives it by default, if it is a GPU."""
    if device.type != "cuda" or device.index is not None:
        return device
    return torch.device("cuda", torch.cuda.current_device() if torch.cuda.is_available() else 0)


def pick_precision(name: str, device: torch.device) -> str:
    """Returns the precision: the given one, or for ``auto`` bfloat16 where the device computes it
    fast, else float32."""
    if name != "auto":
        return name
    if device.type == "cuda":
        fast = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        fast = device.type == "cpu" and (has_amx() or has_avx512_bf16())
    return "bfloat16" if fast else "float32"


def set_determinism(device: torch.device, deterministic: bool) -> None:
    """Makes operators bit-reproducible if ``deterministic``; torch warns of one that cannot be. On
    CUDA float32 convolutions otherwise use TF32; matrix products, those of the losses included,
    never do."""
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    if device.type == "cuda":
        # Read by cuBLAS when a thread first uses it; its default is 32 MiB on some GPUs. A step's
        # matrix products are small, and torch accepts only the first setting as deterministic.
        os.environ.setdefault(
            "CUBLAS_WORKSPACE_CONFIG", ":16:8" if deterministic else ":4096:2:16:8"
        )
        torch.backends.cudnn.deterministic = deterministic
        _allow_tf32(not deterministic)


def _allow_tf32(allowed: bool) -> None:
    """Sets torch's older TF32 switch for convolutions, which also sets the newer ones of torch 2.9
    and stays readable for others; torch 2.9 to 2.11 warn against it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Please use the new API settings to control TF32")
        torch.backends.cudnn.allow_tf32 = allowed


def is_out_of_memory(error: BaseException) -> bool:
    """Returns whether an error means that memory ran out. CUDA's allocator has an exception class
    for it; the CPU, MPS and CUDA's libraries only have messages, of which cuDNN's last is also that
    of a convolution it does not know."""
    messages = (
        "can't allocate memory",
        "CUDA error: out of memory",
        "CUDA driver error: out of memory",
        "CUBLAS_STATUS_ALLOC_FAILED",
        "CUDNN_STATUS_ALLOC_FAILED",
        "CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
        "CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED",
        "unable to find an engine to execute this computation",
        "MPS backend out of memory",
    )
    in_words = isinstance(error, RuntimeError) and any(words in str(error) for words in messages)
    return in_words or isinstance(error, torch.OutOfMemoryError | MemoryError)


def available_memory() -> int:
    """Returns the bytes of main memory that can be allocated without swapping."""
    return psutil.virtual_memory().available


def free_memory(device: torch.device) -> int:
    """Returns the bytes that can be allocated on a device now, within the share of it that this
    process may use."""
    if device.type != "cuda":
        return available_memory()
    free, total = torch.cuda.mem_get_info(device)
    allowed = int(torch.cuda.get_per_process_memory_fraction(device.index) * total)
    most = min(free + torch.cuda.memory_reserved(device), allowed)
    return max(0, most - torch.cuda.memory_allocated(device))


@contextmanager
def memory_limited(device: torch.device, budget: int | None) -> Iterator[None]:
    """Limits CUDA's allocator to ``budget`` bytes inside the block, as on a smaller card. Other
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
    """Returns a peak in bytes: on CUDA the most that the allocator reserved since
    ``reset_peak_memory``; else the process's highest resident memory, on Linux also since then."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved(device)
    status = PROCESS / "status"
    text = status.read_text(encoding="utf-8") if status.is_file() else ""
    if match := re.search(r"^VmHWM:\s*(\d+) kB$", text, re.MULTILINE):
        return 1024 * int(match[1])
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def reset_peak_memory(device: torch.device) -> None:
    """Restarts the count of ``peak_memory``. On CUDA, the allocator's free memory is returned to
    the device."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    elif PROCESS.is_dir():
        with suppress(OSError):  # not writable everywhere
            (PROCESS / "clear_refs").write_text("5", encoding="ascii")


def device_name(device: torch.device) -> str:
    """Returns the device's name for records."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {os.cpu_count()} cores"


@contextmanager
def full_float32() -> Iterator[None]:
    """Computes float32 convolutions on CUDA without TF32 inside the block. Torch's older switch can
    always be set, but not read once a user has set the newer ones of torch 2.9."""
    cudnn = torch.backends.cudnn
    newer = (cudnn.conv, cudnn.rnn) if hasattr(cudnn, "conv") else ()
    before = [operators.fp32_precision for operators in newer]
    allowed = "tf32" in before if newer else cudnn.allow_tf32
    _allow_tf32(False)
    try:
        yield
    finally:
        _allow_tf32(allowed)
        for operators, precision in zip(newer, before, strict=True):
            operators.fp32_precision = precision


@contextmanager
def usual_modes() -> Iterator[None]:
    """Inside, gradients are computed and autocast is off, whatever the caller has chosen."""
    with torch.inference_mode(False), torch.enable_grad(), ExitStack() as casts:
        for device_type in ("cpu", "cuda", "mps"):
            if torch.is_autocast_enabled(device_type):
                casts.enter_context(torch.autocast(device_type, enabled=False))
        yield


def preferred_layout(values: torch.Tensor) -> torch.Tensor:
    """Returns feature maps (B, C, H, W), or a convolution's weight, in the memory format their
    device prefers: channels-last on CUDA, where cuDNN would otherwise copy them."""
    if not values.is_cuda or values.dim() != 4:
        return values
    return values.contiguous(memory_format=torch.channels_last)


def to_device(values: np.ndarray | torch.Tensor, device: torch.device) -> torch.Tensor:
    """Returns an array or tensor on a device, with its dtype. On CUDA the copy is asynchronous,
    from page-locked memory."""
    tensor = torch.from_numpy(values) if isinstance(values, np.ndarray) else values
    if device.type == "cuda" and not tensor.is_pinned():
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
