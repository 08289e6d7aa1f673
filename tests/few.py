"""Fewer images of the sample that ships, for networks that take long on all of them."""

import numpy as np
import torch
from torch.utils.data import TensorDataset

from greedy.data import Split, load_dataset

TRAIN, TEST = 1000, 1000
DATA = ("--data", "few:sets")


def sets() -> tuple[TensorDataset, TensorDataset]:
    """Returns the first training images, and all for testing."""
    sample = load_dataset("fashion-mnist-sample")
    return _first(sample.train, TRAIN), _first(sample.test, TEST)


def _first(split: Split, rows: int) -> TensorDataset:
    images, labels = split.read(np.arange(rows))
    samples = TensorDataset(torch.from_numpy(images), torch.from_numpy(labels))
    samples.classes = [str(number) for number in range(10)]
    return samples
