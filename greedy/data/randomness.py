"""Random transforms: finding a data set's, and seeding the generators that they draw from."""

import random
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from functools import partial
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch

from greedy.base.seeds import derive_seed, global_states, seed_globals
from greedy.data.classes import inner_set

Generator = np.random.Generator | np.random.RandomState | random.Random | torch.Generator

LONG = 1000  # a container of more items holds data, not a few transforms
CALLED = ("__getitem__", "__call__", "forward")  # by those who read a sample or transform it


def own_generators(samples: Any) -> list[Generator]:
    """Returns the generators that a set can reach: those among the attributes of the set, of its
    transforms and of the objects inside them, and among the names that their functions use."""
    generators, seen, left = [], {}, [samples]
    while left:
        item = left.pop()
        if id(item) in seen:
            continue
        seen[id(item)] = item  # kept, so that no other object gets its id
        if isinstance(item, Generator):
            generators.append(item)
        else:
            left += _parts(item)
    return generators


def _parts(item: Any) -> Collection[Any]:
    """Returns the objects inside another one that may hold generators."""
    parts: Collection[Any] = ()
    match item:
        case dict():
            parts = item.values()
        case list() | tuple() | set():
            parts = item
        case partial():
            parts = item.func, item.args, item.keywords
        case MethodType():
            parts = item.__self__, item.__func__
        case FunctionType():
            parts = _used_by(item)
        case type() | ModuleType() | torch.Tensor():
            pass
        case _ if hasattr(item, "__dict__"):
            methods = (getattr(type(item), name, None) for name in CALLED)
            parts = vars(item), *(each for each in methods if isinstance(each, FunctionType))
    return parts if len(parts) <= LONG else ()


def _used_by(function: FunctionType) -> list[Any]:
    """Returns what a function uses by name, but no functions of other modules."""
    names = function.__globals__
    used = [names[name] for name in _names_in(function.__code__) if name in names]
    with suppress(ValueError):  # a variable that is not set yet
        used += [cell.cell_contents for cell in function.__closure__ or ()]
    return [
        each for each in used if not isinstance(each, FunctionType) or each.__globals__ is names
    ]


def _names_in(code: CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):  # a function or comprehension inside it
            yield from _names_in(constant)


def seed_generators(own: Sequence[Generator], seed: int, *key: int | str) -> None:
    """Seeds the global generators of Python, NumPy and torch, and a set's ``own`` ones, with what
    follows from ``seed`` and ``key``."""
    seed_globals(derive_seed(seed, "pass", *key))
    for number, generator in enumerate(own):
        derived = derive_seed(seed, "pass", *key, number)
        if isinstance(generator, np.random.Generator):
            bits = generator.bit_generator
            bits.state = type(bits)(derived).state
        elif isinstance(generator, torch.Generator):
            generator.manual_seed(derived)
        else:
            generator.seed(derived % 2**32)


def generator_states(own: Sequence[Generator]) -> list[Any]:
    """Returns the states of the global generators and of a set's ``own`` ones, to be compared."""
    states = global_states()
    for generator in own:
        if isinstance(generator, np.random.Generator):
            states.append(str(generator.bit_generator.state))
        elif isinstance(generator, torch.Generator):
            states.append(generator.get_state().numpy().tobytes())
        elif isinstance(generator, random.Random):
            states.append(generator.getstate())
        else:
            states.append(str(generator.get_state()))
    return states


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
