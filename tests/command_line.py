"""The command line, called in this process, and a small recipe for it."""

import json
from pathlib import Path
from typing import Any

import tomli_w
from click.testing import CliRunner, Result

from greedy.cli.main import cli

SMALL = {
    "data": {"name": "fashion-mnist-sample"},
    "model": {"network": "mlp", "hidden_layers": 2, "hidden_width": 16},
    "loss": {"name": "predsim"},
    "training": {
        "epochs": 1,
        "batch_size": 256,
        "learning_rate": 0.002,
        "precision": "float32",
    },
}

NETWORKS = """
from torch import nn


def network():
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 16), nn.ReLU(), nn.Linear(16, 10))


def convolutional():
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.AvgPool2d(16),
        nn.Flatten(), nn.Linear(128, 10),
    )
"""  # a module of networks that are built in Python

BUILT_IN_PYTHON = {"network": "python", "hidden_layers": None, "hidden_width": None}


def small_recipe(**sections: dict[str, Any]) -> str:
    """Returns a recipe that trains in seconds, as TOML. Fields of its sections are added or
    changed, or left out if they are ``None``."""
    document = {}
    for name in SMALL | sections:
        fields = SMALL.get(name, {}) | sections.get(name, {})
        document[name] = {key: value for key, value in fields.items() if value is not None}
    return tomli_w.dumps(document)


def greedy(*arguments: object) -> Result:
    """Runs a command and returns its result."""
    return CliRunner().invoke(cli, [str(each) for each in arguments])


def said(*arguments: object) -> str:
    """Runs a command that succeeds and returns its output."""
    result = greedy(*arguments)
    assert result.exit_code == 0, result.output
    return result.output


def refused(*arguments: object) -> str:
    """Runs a command that is refused as the user's mistake, and returns what it says of it."""
    result = greedy(*arguments)
    assert result.exit_code == 2, result.output
    assert "Error" not in result.stdout and "Traceback" not in result.stdout
    return result.stderr


def answer(*arguments: object) -> Any:
    """Runs a command that succeeds and returns the JSON document that it prints."""
    result = greedy(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def train(folder: Path, recipe: str, *options: object, run: str = "run") -> Path:
    """Trains a recipe, which is written beside the run. Returns the run's directory."""
    (folder / "tiny.toml").write_text(recipe)
    said("train", "--recipe", folder / "tiny.toml", "--run", folder / run, *options)
    return folder / run


def written(directory: Path) -> dict[Path, tuple[bytes, int]]:
    """Returns all files below a directory with their bytes and the times at which they were
    written."""
    files = (path for path in sorted(directory.rglob("*")) if path.is_file())
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def times(directory: Path) -> dict[Path, int]:
    """Returns the times at which all files and folders below a directory were written."""
    return {path: path.stat().st_mtime_ns for path in directory.rglob("*")}
