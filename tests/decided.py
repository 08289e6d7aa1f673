"""What is decided of a stage, for tests that look at a part of it."""

from typing import Any

from greedy.runs.choices import Choices

USUAL = {
    "precision": "float32",
    "views": 1,
    "encoding": "uint8",
    "shuffle": "rows",
    "chunk_rows": 16,
    "memory_mode": "plain",
    "micro_batch": 16,
    "planned_peak_bytes": None,
    "write_batch": 16,
    "threads": 1,
}


def choices(**changed: Any) -> Choices:
    """Returns the usual choices of a stage, with some of them changed."""
    return Choices.model_validate(USUAL | changed)
