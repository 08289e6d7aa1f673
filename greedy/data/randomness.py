"""Random transforms: finding a data set's, seeding the generators that they draw from, and
protecting the global ones from them."""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import numpy as np
import torch

from greedy.base.seeds import derive_seed, seed_torch
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


Generator = np.random.Generator | np.random.RandomState | random.Random | torch.Generator

LONG = 1000  # a container of more items is taken for data, not for a few transforms


def own_generators(samples: Any) -> list[Generator]:
    """Returns the generators that are attributes of a set, of its transforms, and of the sets and
    objects inside them."""
    generators, seen, left = [], set(), [samples]
    while left:
        item = left.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, Generator):
            generators.append(item)
        elif isinstance(item, dict):
            left += item.values() if len(item) <= LONG else ()
        elif isinstance(item, list | tuple | set):
            left += item if len(item) <= LONG else ()
        elif hasattr(item, "__dict__") and not isinstance(item, type | ModuleType | torch.Tensor):
            left.append(vars(item))
    return generators


def seed_generators(own: Sequence[Generator], seed: int, *key: int | str) -> None:
    """Seeds the global generators of Python, NumPy and torch, and a set's ``own`` ones, with what
    follows from ``seed`` and ``key``."""
    derived = derive_seed(seed, "pass", *key)
    random.seed(derived)
    np.random.seed(derived % 2**32)  # noqa: NPY002 - transforms draw from it
    seed_torch(derived, torch.device("cpu"))
    for number, generator in enumerate(own):
        derived = derive_seed(seed, "pass", *key, number)
        if isinstance(generator, np.random.Generator):
            bits = generator.bit_generator
            bits.state = type(bits)(derived).state
        elif isinstance(generator, torch.Generator):
            generator.manual_seed(derived)
        else:
            generator.seed(derived % 2**32)


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
