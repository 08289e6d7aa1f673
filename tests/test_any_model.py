"""Networks of libraries and of functions, from the plan to the exported file."""

from pathlib import Path

import pytest
import torch
from command_line import answer, refused, said, small_recipe
from small_training import noise, weights
from test_sequential import FeaturesLast
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from torchvision.models.resnet import BasicBlock

from greedy import GreedyTrainer, RunDirectory
from greedy.data import dataset_from_torch
from greedy.models import library_network
from greedy.recipes.loader import load_for_model
from greedy.report.repeating import commands
from greedy.runs.network import assemble

MODULE = """
from test_any_model import images, own


def sets():
    return images(32), images(16)


def network():
    return own()
"""
DATA = ("--data", "any_model:sets")
FUNCTION = "any_model:network"


def images(rows: int) -> TensorDataset:
    data = noise(rows, 3, 3, 32)
    data.classes = ["a", "b", "c"]
    return data


class Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, stride=2)
        self.blocks = nn.Sequential(BasicBlock(4, 4), BasicBlock(4, 4))
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


def own() -> nn.Module:
    torch.manual_seed(1)
    return Own()


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("any_model.py").write_text(MODULE)
    sections = {"data": {"name": "any_model:sets"}, "training": {"batch_size": 16}}
    Path("tiny.toml").write_text(small_recipe(**sections))
    return Path("tiny.toml")


def test_a_network_of_a_library_is_planned_trained_and_used(recipe: Path) -> None:
    """A small one; `test_imagenet.py` trains one of torchvision."""
    named = ("--recipe", recipe, *DATA, "--model", "timm:test_resnet", "--stages", 4)
    planned = answer("plan", *named, "--run", "whole")
    names = [stage["name"] for stage in planned["stages"]]
    assert len(names) == 4

    said("train", *named, "--run", "whole")
    first = weights(Path("whole"), 2)
    status = answer("status", "--run", "whole")
    assert [stage["name"] for stage in status["stages"]] == names
    said("train-stage", "--stage", 2, "--from-cache", "whole/stage1", "--retrain")
    again = weights(Path("whole"), 2)
    assert all(torch.equal(first[name], again[name]) for name in first)

    said("export", "--run", "whole", "--to", "net.pt2")
    assert "16 images" in said("evaluate", "--run", "whole")
    x = torch.rand(2, 3, 32, 32)
    network = assemble(RunDirectory.open(Path("whole")), None)
    torch.testing.assert_close(torch.export.load("net.pt2").module()(x), network(x))


def test_first_weights_follow_from_the_seed(recipe: Path) -> None:
    changes = ["model.stages=3", "training.learning_rate=1e-30"]
    first = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        own = load_for_model(recipe, "timm:test_resnet", [*changes, f"seed={seed}"])
        trainer = GreedyTrainer.from_recipe(own, name, device="cpu")
        trainer.prepare(dataset_from_torch(images(32), images(16)))
        trainer.train_stage(1)
        first.append(weights(Path(name), 1)["layer.0.weight"])
    a, b, c = first
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_a_function_in_a_recipe_is_called_only_if_it_is_named(recipe: Path) -> None:
    recipe.write_text(
        small_recipe(
            data={"name": "any_model:sets"},
            model={"network": FUNCTION, "hidden_layers": None, "hidden_width": None},
            training={"batch_size": 16},
        )
    )
    named = ("--recipe", recipe, "--run", "own", *DATA)
    for command in ("train", "plan"):
        told = refused(command, *named)
        assert f"code is only run if you name it: add --model {FUNCTION}" in told
    assert not Path("own").exists()
    answer("plan", *named, "--model", FUNCTION)
    said("train", *named, "--model", FUNCTION)
    assert "add --model" in refused("evaluate", "--run", "own")
    assert "give --model any_model" in refused("evaluate", "--run", "own", "--model", "any_model:x")
    assert "16 images" in said("evaluate", "--run", "own", "--model", FUNCTION)
    assert "test error" in said("train", "--run", "own", "--model", FUNCTION)
    repeated = commands(RunDirectory.open(Path("own")))
    assert all(f"--model {FUNCTION}" in command for command in repeated)


def test_a_model_in_python_needs_no_sequential(tmp_path: Path) -> None:
    model = own()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer = GreedyTrainer(
        model, run_dir=tmp_path / "run", stages=["blocks.1"], epochs=1, batch_size=16, device="cpu"
    )
    records = trainer.fit(images(32), images(16))
    assert [record.name for record in records] == ["stem…blocks.0", "blocks.1", "output"]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert trainer.assemble()(torch.rand(2, 3, 32, 32)).shape == (2, 3)


def vision_transformer() -> nn.Module:
    return library_network("timm:test_vit", (3, 32, 32), 3)


@pytest.mark.parametrize("model", [vision_transformer, FeaturesLast])
def test_tokens_and_maps_with_features_last_are_trained(tmp_path: Path, model) -> None:
    own = {"stages": 3, "epochs": 1, "batch_size": 16, "precision": "float32", "device": "cpu"}
    trainer = GreedyTrainer(model(), run_dir=tmp_path / "run", **own)
    trainer.fit(images(32), images(16))
    x = torch.rand(2, 3, 32, 32)
    exported = torch.export.export(trainer.assemble(), (x,))
    torch.testing.assert_close(exported.module()(x), trainer.assemble()(x))
