"""The commands that repeat a run."""

import json
import shlex
from typing import Any

from greedy.base.errors import UserError
from greedy.data import DATASETS
from greedy.recipes import Recipe, differences, load, names
from greedy.recipes.networks import needs_code
from greedy.runs.directory import RunDirectory

SHIPPED_DATA = "fashion-mnist-sample"
MILESTONES = "training.milestones"
FILE = "recipe.toml"  # the name of a file with the run's recipe


def commands(run: RunDirectory) -> list[str]:
    """Returns shell commands that repeat a run, with a recipe that ships and its changed fields, or
    with the run's recipe in a file. Returns none for a run that began with the weights of another,
    or whose loss was written in Python: no command makes those."""
    recipe = run.recipe
    if recipe.loss.name == "python" or recipe.model.initial_weights:
        return []
    directory = shlex.quote(f"runs/{run.path.resolve().name}")
    options = [f"--run {directory}"]
    if needs_code(network := recipe.model.network):
        options.append(f"--model {'module:function' if network == 'python' else network}")
    evaluate = ["greedy evaluate", *options]
    if any(entry.name == recipe.data.name != SHIPPED_DATA for entry in DATASETS):
        options.append("--download")
    elif ":" in recipe.data.name:  # a folder or function must be named on the command line
        options.append(f"--data {shlex.quote(recipe.data.name)}")
    train = ["greedy train", f"--recipe {_recipe(recipe)}", *options]
    return [" ".join(train), " ".join(evaluate)]


def _recipe(recipe: Recipe) -> str:
    """Returns the value of --recipe, followed by the options --set."""
    if recipe.name not in names():
        return FILE
    changed = {key: new for key, _, new in differences(load(recipe.name), recipe)}
    without_milestones = {key: new for key, new in changed.items() if key != MILESTONES}
    for settings in (without_milestones, changed):  # milestones follow the epochs, or were set
        overrides = [f"{key}={_value(new)}" for key, new in settings.items()]
        try:
            repeated = load(recipe.name, overrides)
        except UserError:  # a field of the recipe was removed, which --set cannot do
            return FILE
        if not differences(repeated, recipe):
            options = [f"--set {shlex.quote(override)}" for override in overrides]
            return " ".join([recipe.name, *options])
    return FILE


def _value(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
