"""The heap that a process keeps between steps on a CPU.

The C library returns large blocks to the system as they are freed, and the system clears them page
by page when they are allocated again: up to 40 % of a step on a CPU. Keeping them costs a fifth to
a third more memory, through fragmentation.
"""

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

# From <malloc.h>
TRIM_THRESHOLD, MMAP_THRESHOLD, MMAP_MAX = -1, -3, -4
UNLIMITED = -1
LARGEST_DYNAMIC = 32 * 2**20  # the largest that glibc's threshold grows to


@contextmanager
def freed_memory_kept(device: torch.device) -> Iterator[None]:
    """Keeps freed memory in the process inside the block, if the device is the CPU and the C
    library supports it; free memory is returned to the system at the end."""
    library = _library(device)
    if library is None:
        yield
        return
    library.mallopt(MMAP_MAX, 0)
    library.mallopt(TRIM_THRESHOLD, UNLIMITED)
    try:
        yield
    finally:
        library.mallopt(MMAP_MAX, 65536)
        library.mallopt(MMAP_THRESHOLD, LARGEST_DYNAMIC)
        library.mallopt(TRIM_THRESHOLD, 2 * LARGEST_DYNAMIC)
        library.malloc_trim(0)


def release_free_memory(device: torch.device) -> None:
    """Returns the process's free memory to the device."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif (library := _library(device)) is not None:
        library.malloc_trim(0)


def _library(device: torch.device) -> ctypes.CDLL | None:
    """Returns the C library; ``None`` unless it manages the device's memory and can be
    configured."""
    library = ctypes.CDLL(None) if sys.platform == "linux" and device.type == "cpu" else None
    able = hasattr(library, "mallopt") and hasattr(library, "malloc_trim")
    return library if able else None
