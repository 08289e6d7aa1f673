"""The runs that reports are made of."""

import shutil
from pathlib import Path

from command_line import small_recipe, train

RECIPE = small_recipe(
    training={"epochs": 2}, store={"views": 1}, paper={"table": 1, "test_error_percent": 8.5}
)
RUNS = {
    "predsim": [],
    "sim": ["loss.name=sim", "training.test_every=2"],
    "joint": ["training.strategy=joint"],
    "backprop": ["training.strategy=backprop", "loss.name=glob"],
}


def trained(folder: Path, name: str, settings: list[str]) -> Path:
    """Trains a run of the recipe with some settings, in the folder."""
    options = [option for each in settings for option in ("--set", each)]
    return train(folder, RECIPE, *options, run=name)


def all_trained(folder: Path) -> Path:
    """Trains runs of several losses and strategies, and one without its last stage. Returns their
    folder."""
    for name, settings in RUNS.items():
        trained(folder, name, settings)
    partial = shutil.copytree(folder / "predsim", folder / "partial")
    shutil.rmtree(partial / "stage3")
    return folder
