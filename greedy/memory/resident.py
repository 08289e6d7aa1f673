"""The memory of a process that trains on a CPU, beside the tensors that are counted."""

import psutil

LIBRARIES = 160 * 2**20  # bytes of oneDNN's code and of reading and writing data
WHILE_COMPUTING = 1 / 3  # of the counted bytes: working memory of operators and of the C library


def resident(counted: int) -> int:
    """Estimates the most bytes of main memory of a process like this one that trains on a CPU, from
    measurements (docs/architecture.md). A store held in memory is not included.

    Args:
        counted: counted bytes of its tensors.
    """
    process = psutil.Process().memory_info().rss
    return process + LIBRARIES + counted + int(WHILE_COMPUTING * counted)
