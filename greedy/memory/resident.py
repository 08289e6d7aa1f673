"""The memory of a process that trains on a CPU, beside the tensors that are counted."""

import psutil

LIBRARIES = 160 * 2**20  # bytes of oneDNN's code and of reading and writing data
# Of the counted bytes: working memory of operators and what the C library keeps, which in half
# precision is more beside smaller tensors.
WHILE_COMPUTING = {"float32": 1 / 3, "bfloat16": 0.6, "float16": 0.6}


def resident(counted: int, precision: str) -> int:
    """Estimates the most bytes of main memory of a process like this one that trains on a CPU, from
    measurements (docs/architecture.md). A store held in memory is not included.

    Args:
        counted: counted bytes of its tensors.
        precision: in which encoders and heads compute.
    """
    process = psutil.Process().memory_info().rss
    return process + LIBRARIES + counted + int(WHILE_COMPUTING[precision] * counted)
