"""Networks of libraries and functions on the command line: trained, resumed, evaluated, exported."""

from pathlib import Path

import pytest
import torch
from command_line import answer, said, small_recipe
from torch.utils.data import TensorDataset

from greedy import RunDirectory
from greedy.cli.main import cli  # noqa: F401

MODULE = """
import torch
from test_any_model import images
from torchvision.models import resnet18


def sets():
    return images(48), images(24)


def network():
    torch.manual_seed(1)
    return resnet18(num_classes=3)
"""
DATA = ("--data", "any_model:sets")


def images(rows: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(rows)
    values = torch.randint(256, (rows, 3, 16, 16), dtype=torch.uint8, generator=generator)
    data = TensorDataset(values, torch.arange(rows) % 3)
    data.classes = ["a", "b", "c"]
    return data


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("any_model.py").write_text(MODULE)
    training = {"batch_size": 16}
    Path("tiny.toml").write_text(small_recipe(data={"name": "any_model:sets"}, training=training))
    return Path("tiny.toml")


def weights(run: str) -> list[bytes]:
    return [file.read_bytes() for file in sorted(Path(run).glob("stage*/encoder.safetensors"))]


def test_a_network_of_torchvision_is_planned_trained_and_used(recipe: Path) -> None:
    named = ("--recipe", recipe, *DATA, "--model", "torchvision:resnet18", "--stages", 4)
    planned = answer("plan", *named, "--run", "whole")
    stages = [stage["name"] for stage in planned["stages"]]
    assert len(stages) == 4
    assert stages[-1] == "output"

    said("train", *named, "--run", "whole")
    assert stages[0] in said("status", "--run", "whole")
    assert "already" not in said(
        "train-stage", "--stage", 2, "--from-cache", "whole/stage1", "--retrain"
    )
    said("train", "--run", "whole")
    assert "24 images" in said("evaluate", "--run", "whole")
    said("export", "--run", "whole", "--to", "net.pt2")
    run = RunDirectory.open(Path("whole"))
    from greedy.runs.network import assemble

    x = torch.rand(2, 3, 16, 16)
    exported = torch.export.load("net.pt2").module()
    torch.testing.assert_close(exported(x), assemble(run, None)(x))
