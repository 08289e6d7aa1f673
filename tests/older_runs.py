"""Small runs of three kinds, as they were before the package was rearranged.

`python tests/older_runs.py FOLDER` makes them; what it made then is `data/older_runs.tar.gz`.
"""

import sys
from pathlib import Path

import torch
from small_training import CLASSES, SIDE, TEST, TRAIN, network
from torch import nn

from greedy import GreedyTrainer

SETTINGS = {"epochs": 2, "learning_rate": 0.01, "batch_size": 32, "device": "cpu", "seed": 3}
SETTINGS |= {"precision": "float32", "reuse": 0}  # as it was before views were replaced
KINDS = {
    "mlp": {"views": 2},
    "short-of-memory": {
        "views": 2,
        "augmentation": "crop4+hflip",
        "encoding": "uint4",
        "memory_budget": "96KiB",
    },
    "joint": {"strategy": "joint", "views": 4},
}


def convolutions() -> nn.Sequential:
    torch.manual_seed(0)
    first = [nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.LeakyReLU(), nn.MaxPool2d(2)]
    second = [nn.Dropout2d(0.1), nn.Conv2d(4, 6, 3, padding=1), nn.BatchNorm2d(6), nn.LeakyReLU()]
    return nn.Sequential(*first, *second, nn.Flatten(), nn.Linear(6 * (SIDE // 2) ** 2, CLASSES))


def new_trainer(kind: str, run: Path) -> GreedyTrainer:
    model = convolutions() if kind == "short-of-memory" else network()
    return GreedyTrainer(model, run_dir=run, **SETTINGS, **KINDS[kind])


if __name__ == "__main__":
    for kind in KINDS:
        new_trainer(kind, Path(sys.argv[1]) / kind).fit(TRAIN, TEST)
