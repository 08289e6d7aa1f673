"""The commands that make a run again."""

import json
import shlex
from typing import Any

from greedy.base.errors import UserError
from greedy.data import DATASETS
from greedy.recipes import Recipe, differences, load, names
from greedy.runs.directory import RunDirectory

SHIPPED_DATA = "fashion-mnist-sample"
MILESTONES = "training.milestones"
FILE = "recipe.toml"  # the run's own


def commands(run: RunDirectory) -> list[str]:
    """Lines of a shell: a recipe that ships, with what was changed in it, or else the run's own,
    kept in a file. None for a run that goes on from another's weights or whose loss was written in
    Python: no command line makes those."""
    recipe = run.recipe
    if recipe.loss.name == "python" or recipe.model.initial_weights:
        return []
    directory = shlex.quote(f"runs/{run.path.resolve().name}")
    options = [f"--run {directory}"]
    if recipe.model.network == "python":
        options.append("--model module:function")
    evaluate = ["greedy evaluate", *options]
    if any(entry.name == recipe.data.name != SHIPPED_DATA for entry in DATASETS):
        options.append("--download")
    elif ":" in recipe.data.name:  # a folder or function is named again, to be trusted
        options.append(f"--data {shlex.quote(recipe.data.name)}")
    train = ["greedy train", f"--recipe {_recipe(recipe)}", *options]
    return [" ".join(train), " ".join(evaluate)]


def _recipe(recipe: Recipe) -> str:
    """What --recipe takes, and the --set that belong to it."""
    if recipe.name not in names():
        return FILE
    changed = {key: new for key, _, new in differences(load(recipe.name), recipe)}
    followed = {key: new for key, new in changed.items() if key != MILESTONES}
    for each in (followed, changed):  # milestones move with the epochs, or were set
        overrides = [f"{key}={_value(new)}" for key, new in each.items()]
        try:
            again = load(recipe.name, overrides)
        except UserError:  # a setting that is taken back by leaving it out
            return FILE
        if not differences(again, recipe):
            return " ".join([recipe.name, *(f"--set {shlex.quote(each)}" for each in overrides)])
    return FILE


def _value(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
