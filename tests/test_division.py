"""Stages by their number and by names of modules, and the names of stages."""

import pytest
from small_training import convolutional, new_trainer
from torch import nn

from greedy.base.errors import UserError
from greedy.build.cut_network import cut_as
from greedy.models import cut, library_network, sequential
from greedy.models.division import balanced
from greedy.recipes import Model, load

IMAGE = (3, 32, 32)


@pytest.fixture(scope="module")
def resnet() -> nn.Sequential:
    return sequential(library_network("timm:resnet10t", IMAGE, 5), IMAGE)


def names(network: nn.Sequential, stages: object) -> list[str]:
    model = Model.model_validate({"network": "timm:resnet10t", "stages": stages})
    return [stage.name for stage in cut_as(model, network, IMAGE)]


def test_stages_have_the_names_of_the_models_modules(resnet: nn.Sequential) -> None:
    stem = ["conv1.0", "conv1.3", "conv1.6"]
    blocks = ["layer1.0", "layer2.0", "layer3.0", "layer4.0"]
    assert names(resnet, "auto") == [*stem, *blocks, "fc"]


def test_stages_begin_at_named_modules(resnet: nn.Sequential) -> None:
    expected = ["conv1.0…6", "layer1.0…layer2.0", "layer3.0…layer4.0", "fc"]
    assert names(resnet, "layer1,layer3.0") == expected
    assert names(resnet, ["conv1.0", "layer3", "layer1.0", "fc"]) == expected


@pytest.mark.parametrize(
    ("operations", "sizes"),
    [
        ([1, 1, 1, 1], [2, 2]),
        ([5, 1, 1, 1], [1, 3]),
        ([1, 1, 1, 9, 1, 1, 1], [3, 1, 3]),
        ([3, 1, 2], [1, 1, 1]),
    ],
)
def test_groups_have_about_as_many_operations_each(operations, sizes) -> None:
    assert balanced(operations, len(sizes)) == sizes


def test_a_number_of_stages_counts_the_output_layer(resnet: nn.Sequential) -> None:
    found = names(resnet, 4)
    assert len(found) == 4
    assert found[-1] == "fc"
    assert len(names(resnet, 8)) == 8


def test_stages_of_a_flat_network_keep_their_names(tmp_path) -> None:
    trainer = new_trainer(tmp_path / "run", convolutional(), stages=["5"])
    assert [s.name for s in cut_as(trainer.recipe.model, convolutional(), (1, 8, 8))] == [
        "conv6",
        "linear16",
        "linear3",
    ]


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        (9, "is 9 and the network has 8 layers and blocks.*: give 2 to 8"),
        ("layer9", "no layer or block of the network: choose among layer4.0, layer3.0"),
        ("xyz", r"choose among conv1\.0, conv1\.3, conv1\.6, …"),
        ("layer1.0.conv2", r"is in layer1\.0, and that stays whole: begin it at layer1\.0"),
    ],
)
def test_stages_that_a_network_does_not_have_are_refused(resnet, stages, message: str) -> None:
    with pytest.raises(UserError, match=message):
        names(resnet, stages)


def test_the_field_is_a_number_or_names() -> None:
    assert load("demo", ["model.stages=a.0,b.1"]).model.stages == ["a.0", "b.1"]
    assert load("demo", ["model.stages=3"]).model.stages == 3
    with pytest.raises(UserError, match="be auto where model.stage_layers is not 1"):
        load("demo", ["model.stages=3", "model.stage_layers=2"])
    with pytest.raises(UserError, match="auto or a whole number of at least 2 or a list of texts"):
        load("demo", ["model.stages=1"])


def test_sizes_of_blocks_may_differ() -> None:
    network = nn.Sequential(*(nn.Linear(2, 2) for _ in range(5)))
    assert [len(stage.layer) for stage in cut(network, [1, 3])] == [1, 3, 1]
