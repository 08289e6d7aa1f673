"""Streams of random numbers, each derived by its name from the one seed of a run."""

import hashlib

import numpy as np
import torch


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
