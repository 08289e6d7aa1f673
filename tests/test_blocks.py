"""Blocks of several layers trained as one stage."""

from pathlib import Path

import pytest
import torch
from command_line import answer, said, small_recipe
from interrupting import StopAfter
from safetensors.torch import load_file
from small_training import TEST, TRAIN, network, new_trainer
from torch import nn

from greedy import GreedyTrainer, UserError, evaluate
from greedy.base.errors import Interrupted
from greedy.models import cut, shapes, vgg8b

CPU = torch.device("cpu")


def small_vgg8b() -> nn.Sequential:
    torch.manual_seed(0)
    return vgg8b(3, 32, 10, feature_multiplier=0.1, hidden_width=20, dropout=0.2)


@pytest.mark.parametrize(
    ("layers", "names"),
    [
        (1, ["conv12", "conv25", "conv25", "conv51", "conv51", "conv51", "linear20"]),
        (2, ["conv12+conv25", "conv25+conv51", "conv51+conv51", "linear20"]),
        (4, ["conv12+conv25+conv25+conv51", "conv51+conv51+linear20"]),
        (100, ["conv12+conv25+conv25+conv51+conv51+conv51+linear20"]),
    ],
)
def test_a_network_in_blocks_is_the_network(layers: int, names: list[str]) -> None:
    network = small_vgg8b().eval()
    blocks = cut(network, layers)
    assert [stage.name for stage in blocks] == [*names, "linear10"]
    assert [stage.number for stage in blocks] == list(range(1, len(names) + 2))
    x = torch.randn(3, 3, 32, 32)
    single, y = cut(network), x
    for block in blocks:
        expected = y
        for stage in single[: len(block.name.split("+"))]:
            expected = stage(expected)
        y = block(y)
        assert torch.equal(y, expected)
        single = single[len(block.name.split("+")) :]
    assert torch.equal(y, network(x))


def test_dropout_and_pooling_stay_between_the_layers_of_a_block() -> None:
    blocks = cut(small_vgg8b(), 3)
    kinds = [[type(module).__name__ for module in block.layer] for block in blocks]
    layer = ["Conv2d", "BatchNorm2d", "LeakyReLU"]
    assert kinds[0] == [*layer, "Dropout2d", *layer, "Dropout2d", "MaxPool2d", *layer]
    assert kinds[2:] == [["Linear", "BatchNorm1d", "LeakyReLU"], ["Linear"]]
    assert [len(block.pool) for block in blocks] == [0, 1, 0, 0]
    rates = [block.dropout.rate if block.dropout else None for block in blocks]
    assert rates == [None, 0.2, 0.2, 0.2]
    assert [block.flatten for block in blocks] == [False, False, True, False]
    block_shapes = shapes(blocks, (3, 32, 32))
    assert [shape.output for shape in block_shapes] == [(25, 16, 16), (51, 2, 2), (20,), (10,)]
    assert block_shapes[1].hidden == (51, 4, 4)


def test_stages_of_a_staged_network_are_merged_too() -> None:
    def part(width: int) -> nn.Sequential:
        return nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 4), nn.ReLU())

    network = nn.Sequential(part(2), part(3), part(5), nn.Linear(4, 2))
    names = [stage.name for stage in cut(network, 2)]
    assert names == ["linear2+linear4+linear3+linear4", "linear5+linear4", "linear2"]


# A run


def block_trainer(run: Path, dropout: float = 0.1, **settings) -> GreedyTrainer:
    defaults = {"epochs": 5, "views": 1, "encoding": "float32"}
    return new_trainer(run, network(dropout, hidden_layers=3), **(defaults | settings))


def test_a_block_learns_and_is_stopped_resumed_and_left_early(tmp_path: Path) -> None:
    whole, cut_short = tmp_path / "whole", tmp_path / "cut"
    records = block_trainer(whole, stage_layers=2).fit(TRAIN, TEST)
    assert [record.name for record in records] == ["linear16+linear16", "linear16", "output"]
    for record in records:
        assert record.metrics.test_error_percent < 33  # chance is 67
    with pytest.raises(Interrupted, match="in stage 1 after step"):
        block_trainer(cut_short, reporter=StopAfter(17), stage_layers=2).fit(TRAIN, TEST)
    trainer = block_trainer(cut_short, stage_layers=2)
    trainer.fit(TRAIN, TEST)
    for record in records:
        place = f"stage{record.stage}/encoder.safetensors"
        one, other = load_file(whole / place), load_file(cut_short / place)
        assert all(torch.equal(one[key], other[key]) for key in one)  # dropout within included
        until = record.stage if record.stage < len(records) else None
        figures = evaluate(trainer.run, trainer.assemble(until), "test", CPU)
        # Computed in other batches: of the 100 images a few may stand between two classes.
        assert figures.error_percent == pytest.approx(record.metrics.test_error_percent, abs=3)


def test_dropout_within_a_block_acts_in_training_alone(tmp_path: Path) -> None:
    def first_weights(rate: float) -> torch.Tensor:
        trainer = block_trainer(tmp_path / str(rate), stage_layers=2, epochs=1, dropout=rate)
        trainer.fit(TRAIN, TEST)
        network, images = trainer.assemble(), TEST.tensors[0].float() / 255
        assert any(isinstance(module, nn.Dropout) for module in network) == (rate > 0)
        assert torch.equal(network(images), network(images))
        return load_file(trainer.run.stage_dir(1) / "encoder.safetensors")["layer.0.weight"]

    assert not torch.equal(first_weights(0.5), first_weights(0.0))


def test_a_run_keeps_its_blocks(tmp_path: Path) -> None:
    block_trainer(tmp_path / "run", stage_layers=2, epochs=1).fit(TRAIN, TEST)
    with pytest.raises(UserError, match=r"model\.stage_layers is 2 there, 1 here"):
        block_trainer(tmp_path / "run", epochs=1)
    with pytest.raises(
        UserError, match=r"stage_layers is 0 but must be a whole number of at least"
    ):
        block_trainer(tmp_path / "other", stage_layers=0)


RECIPE = small_recipe(
    data={"mean": [0.286], "std": [0.353]},
    model={"hidden_layers": 3, "dropout": 0.1},
    store={"views": 1},
)


def test_the_command_line_plans_trains_and_hands_on_blocks(tmp_path: Path) -> None:
    recipe, run = tmp_path / "tiny.toml", tmp_path / "run"
    recipe.write_text(RECIPE)
    names = ["linear16+linear16", "linear16", "output"]
    given = ("--recipe", recipe, "--stage-layers", 2, "--run", run)

    plan = answer("plan", *given)
    assert [stage["name"] for stage in plan["stages"]] == names
    assert [stage["why_plain"] for stage in plan["stages"]] == ["", "", ""]
    assert "no mode but plain" not in said("plan", *given)

    shown = said("train", *given)
    assert "stage 1/3 linear16+linear16: training, 1 epoch in float32" in shown
    status = answer("status", "--run", run)
    stages = [stage for stage in status["stages"] if stage["stage"]]
    assert [(stage["name"], stage["state"]) for stage in stages] == [(n, "complete") for n in names]
    assert "stage 1/3 linear16+linear16: complete" in said("train", "--run", run)

    figures = answer("evaluate", "--run", run)
    # Computed in other batches: a few of the 1,000 images may stand between two classes.
    assert figures["error_percent"] == pytest.approx(stages[-1]["test_error_percent"], abs=1)
    said("export", "--run", run, "--to", tmp_path / "early.pt2", "--until-stage", 1)
    exported = torch.export.load(tmp_path / "early.pt2").module()
    assert exported(torch.rand(2, 1, 28, 28)).shape == (2, 10)
