"""What a process that trains on a CPU takes, beside the tensors that are counted."""

import psutil

LIBRARIES = 160 * 2**20  # oneDNN's code, what reads and writes data, once a process trains
WHILE_COMPUTING = 1 / 3  # of what is counted: operators' own memory, and what the C library keeps


def resident(counted: int) -> int:
    """Bytes of main memory at most, about, of a process like this one that takes so many for its
    tensors; docs/architecture.md has the measurements. A store held in memory is not in it."""
    process = psutil.Process().memory_info().rss
    return process + LIBRARIES + counted + int(WHILE_COMPUTING * counted)
