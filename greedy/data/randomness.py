"""Transforms that draw at random: which a data set has, and global generators left as they were."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from greedy.data.classes import inner_set


@contextmanager
def generators_kept() -> Iterator[None]:
    """Leaves the global generators of Python, NumPy and torch as they were."""
    # Of all devices, if this process uses them: else it would begin to.
    used = torch.cuda.device_count() if torch.cuda.is_initialized() else 0
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 - what others draw from
    try:
        with torch.random.fork_rng(range(used)):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002


def transform_names(samples: Any) -> list[str]:
    """Returns the names of the transforms of a set and of those it is made of, each once."""
    applied = getattr(samples, "transform", None) or getattr(samples, "transforms", None)
    if applied is None and isinstance(kind := getattr(samples, "format", None), dict):
        applied = kind.get("format_kwargs", {}).get("transform")  # of Hugging Face
    parts = list(getattr(samples, "datasets", ()))
    inner = inner_set(samples)
    found = _names(applied)
    for part in parts if inner is None else [inner, *parts]:
        found += transform_names(part)
    return list(dict.fromkeys(found))


def _names(transform: Any) -> list[str]:
    if transform is None:
        return []
    if isinstance(transform, list | tuple | torch.nn.Sequential | torch.nn.ModuleList):
        return [name for each in transform for name in _names(each)]
    kind = type(transform).__name__
    within = getattr(transform, "transforms", None)
    if within is not None:
        return [kind] * (kind != "Compose") + _names(within)
    return [getattr(transform, "__name__", kind)]
