"""Streams of random numbers, each derived by its name from the one seed of a run."""

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

CPU = torch.device("cpu")


def derive_seed(seed: int, purpose: str, *keys: int | str) -> int:
    """Returns a 63-bit seed for the stream named by (seed, purpose, keys), for instance
    ``derive_seed(1, "dropout", stage, step)``; the same on every machine and in every process."""
    name = repr((seed, purpose, *keys)).encode()
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest()) >> 1


def torch_generator(seed: int, purpose: str, *keys: int | str) -> torch.Generator:
    """Returns a torch CPU generator at the start of the named stream."""
    return torch.Generator().manual_seed(derive_seed(seed, purpose, *keys))


def numpy_generator(seed: int, purpose: str, *keys: int | str) -> np.random.Generator:
    """Returns a NumPy generator at the start of the named stream."""
    return np.random.default_rng(derive_seed(seed, purpose, *keys))


def seed_torch(seed: int, device: torch.device) -> None:
    """Seeds torch's default generators of the CPU and of a device, as ``torch.manual_seed`` does;
    that call takes up to a millisecond to look for devices of every kind."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        torch.cuda.default_generators[index].manual_seed(seed)
    elif device.type == "mps":
        torch.mps.manual_seed(seed)


def global_states() -> list[Any]:
    """Returns the states of the global generators of Python, NumPy and torch, to be compared."""
    return [
        random.getstate(),
        str(np.random.get_state()),  # noqa: NPY002 - users' code draws from it
        torch.get_rng_state().numpy().tobytes(),
    ]


def seed_globals(seed: int, device: torch.device = CPU) -> None:
    """Seeds the global generators of Python and NumPy, and torch's of the CPU and of a device."""
    seed_torch(seed, device)
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002


@contextmanager
def generators_restored() -> Iterator[None]:
    """Restores the global generators of Python, NumPy and torch after the block."""
    # Not of CUDA devices that this process does not use: saving them would initialise CUDA.
    used = torch.cuda.device_count() if torch.cuda.is_initialized() else 0
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        with torch.random.fork_rng(range(used)):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002


@contextmanager
def seeded_globally(seed: int, device: torch.device = CPU) -> Iterator[None]:
    """Seeds the global generators inside the block as ``seed_globals`` does, and restores them
    afterwards."""
    with generators_restored():
        seed_globals(seed, device)
        yield
