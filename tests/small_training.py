"""A small network, images that it learns within seconds, and the files of a run."""

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import TensorDataset

from greedy import GreedyTrainer, RunDirectory, RunState
from greedy.models import mlp

SIDE, CLASSES = 8, 3


def samples(rows: int, seed: int, channels: int = 1) -> TensorDataset:
    """Returns noisy images; the class of an image is its brighter third."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, CLASSES, rows)
    images = random.integers(0, 150, (rows, channels, SIDE, SIDE))
    for i, label in enumerate(labels):
        images[i, :, :, 3 * label : 3 * label + 2] += 80
    return TensorDataset(torch.from_numpy(images.astype(np.uint8)), torch.from_numpy(labels))


TRAIN, TEST = samples(400, 0), samples(100, 1)


def noise(rows: int, classes: int = CLASSES, channels: int = 1, side: int = SIDE) -> TensorDataset:
    """Returns images of which nothing can be learned; classes take turns."""
    random = torch.Generator().manual_seed(rows)
    shape = (rows, channels, side, side)
    images = torch.randint(256, shape, dtype=torch.uint8, generator=random)
    return TensorDataset(images, torch.arange(rows) % classes)


def network(dropout: float = 0.1, hidden_layers: int = 2) -> nn.Sequential:
    torch.manual_seed(0)
    return mlp(1, SIDE, CLASSES, hidden_layers=hidden_layers, hidden_width=16, dropout=dropout)


def convolutional(classes: int = CLASSES) -> nn.Sequential:
    """Makes a convolution with pooling and a linear layer, before the output layer."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.LeakyReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(96, 16),
        nn.BatchNorm1d(16),
        nn.LeakyReLU(),
        nn.Linear(16, classes),
    )


def new_trainer(run: Path, model: nn.Sequential | None = None, **settings) -> GreedyTrainer:
    defaults = {"epochs": 2, "learning_rate": 0.01, "batch_size": 32, "views": 2, "device": "cpu"}
    defaults |= {"precision": "float32"}  # what auto takes depends on the machine
    return GreedyTrainer(model or network(), run_dir=run, **(defaults | settings))


def weights(run: Path, stage: int) -> dict[str, torch.Tensor]:
    return load_file(run / f"stage{stage}/encoder.safetensors")


def states(run: RunDirectory, numbers: Iterable[int]) -> list[str]:
    """Returns the states of a run's stages."""
    state = RunState.read(run)
    return [state.stage_state(number) for number in numbers]


def learned(run: Path, stage: int) -> bool:
    """Returns whether a stage's loss was lower in its last epoch than in its first."""
    lines = (run / f"stage{stage}/history.jsonl").read_text().splitlines()
    first, *_, last = (json.loads(line)["loss"] for line in lines)
    return last < first


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def files(directory: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()
    }
