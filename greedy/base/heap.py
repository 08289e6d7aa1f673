"""Memory that a process keeps between steps.

The C library gives large blocks back to the system as they are freed, and the system clears them
page by page when they are taken again: up to 40 % of a step on a CPU. Kept, they cost a fifth to a
third more memory, since what is free between them does not always fit.
"""

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch

# Of <malloc.h>
TRIM_THRESHOLD, MMAP_THRESHOLD, MMAP_MAX = -1, -3, -4
UNLIMITED = -1
LARGEST_DYNAMIC = 32 * 2**20  # what glibc's own threshold grows to


@contextmanager
def kept_memory(device: torch.device) -> Iterator[None]:
    """Inside, freed memory stays with the process if it computes on the CPU and its C library can
    be told so; what is free at the end goes back."""
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


def give_back(device: torch.device) -> None:
    """What is free in the process goes back to the device."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif (library := _library(device)) is not None:
        library.malloc_trim(0)


def _library(device: torch.device) -> ctypes.CDLL | None:
    """The C library, where the device is its own and it can be told what to keep."""
    library = ctypes.CDLL(None) if sys.platform == "linux" and device.type == "cpu" else None
    able = hasattr(library, "mallopt") and hasattr(library, "malloc_trim")
    return library if able else None
