"""A joint training that several processes can be told to run."""

from pathlib import Path

import torch
from small_training import CLASSES, SIDE, TEST, TRAIN, new_trainer
from torch import nn

from greedy.base.ranks import Ranks


def network() -> nn.Sequential:
    """Makes four stages, of which one draws at random inside."""
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.LeakyReLU(), nn.Dropout2d(0.2)),
        *(nn.Conv2d(6, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)),
        nn.Sequential(nn.Flatten(), nn.Linear(8 * SIDE**2 // 4, 16), nn.Dropout(0.3), nn.ReLU()),
        *(nn.Dropout(0.1), nn.Linear(16, CLASSES)),
    )


def train(ranks: Ranks, run: Path, parallel: str, settings: dict[str, object]) -> None:
    torch.set_num_threads(1)
    given = {"strategy": "joint", "views": "auto", "augmentation": "crop4+hflip"} | settings
    trainer = new_trainer(run, network(), parallel=parallel, **given)
    trainer.fit(TRAIN, TEST)
