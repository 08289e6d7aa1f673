"""Random transforms: finding a data set's, and protecting the global generators from them."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from greedy.data.classes import inner_set


@contextmanager
def generators_restored() -> Iterator[None]:
    """Restores the global generators of Python, NumPy and torch after the block."""
    # Not of CUDA devices that this process does not use: saving them would initialise CUDA.
    used = torch.cuda.device_count() if torch.cuda.is_initialized() else 0
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 - transforms draw from it
    try:
        with torch.random.fork_rng(range(used)):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002


def transform_names(samples: Any) -> list[str]:
    """Returns the names of the transforms of a set and of the sets inside it, each once."""
    applied = getattr(samples, "transform", None) or getattr(samples, "transforms", None)
    if applied is None and isinstance(kind := getattr(samples, "format", None), dict):
        applied = kind.get("format_kwargs", {}).get("transform")  # Hugging Face's
    parts = list(getattr(samples, "datasets", ()))
    inner = inner_set(samples)
    names = _names(applied)
    for part in parts if inner is None else [inner, *parts]:
        names += transform_names(part)
    return list(dict.fromkeys(names))


def _names(transform: Any) -> list[str]:
    if transform is None:
        return []
    if isinstance(transform, list | tuple | torch.nn.Sequential | torch.nn.ModuleList):
        return [name for part in transform for name in _names(part)]
    kind = type(transform).__name__
    within = getattr(transform, "transforms", None)
    if within is not None:
        return [kind] * (kind != "Compose") + _names(within)
    return [getattr(transform, "__name__", kind)]
