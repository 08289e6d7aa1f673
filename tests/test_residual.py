"""Residual networks: their sizes, shortcuts and stages, and a run that trains their blocks."""

import re
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from small_training import CLASSES, TEST, TRAIN, learned, new_trainer
from test_exact_stages import make_batch, make_learner, trained
from test_exact_step import CLASSES as STEP_CLASSES
from test_exact_step import MICRO_MODES, assert_same, measured
from torch import nn

from greedy import UserError
from greedy.build.modules import build_network
from greedy.losses.local import Output
from greedy.models import cut, preact_resnet18, resnet, shapes, wide_resnet
from greedy.models.residual import PreActivationBlock, ResidualBlock
from greedy.recipes import Model
from greedy.runs.choices import Mode, StepMemory

PUBLISHED = {  # parameters in millions, and stages
    "wrn-28-10": (36.5, 14),
    "wrn-40-10": (55.8, 20),
    "wrn-16-8": (11.0, 8),
    "preact-resnet18": (11.2, 10),
    "resnet32": (0.46, 16),
    "resnet110": (1.7, 55),
}


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name: str) -> None:
    network = build_network(Model(network=name), (3, 32, 32), 10)
    millions, number = PUBLISHED[name]
    digits = len(str(millions).partition(".")[2])
    assert round(count(network) / 1e6, digits) == millions
    stages = cut(network)
    assert len(stages) == number  # the stem, the blocks, and the output layer where it is alone
    assert [shape.output for shape in shapes(stages, (3, 32, 32))][-1] == (10,)


@pytest.mark.parametrize("name", PUBLISHED)
def test_half_the_width_is_a_quarter_of_the_size(name: str) -> None:
    whole = build_network(Model(network=name), (3, 32, 32), 10)
    half = build_network(Model(network=name, feature_multiplier=0.5), (3, 32, 32), 10)
    assert count(half) / count(whole) == pytest.approx(0.25, abs=0.01)
    assert shapes(cut(half), (3, 96, 96))[-1].output == (10,)


@pytest.mark.parametrize(
    "make",
    [
        lambda: resnet(1, 3, depth=14, feature_multiplier=0.5),
        lambda: wide_resnet(1, 3, depth=16, widen_factor=2, feature_multiplier=0.5, dropout=0.3),
        lambda: preact_resnet18(1, 3, feature_multiplier=0.1),
    ],
    ids=["resnet", "wide_resnet", "preact_resnet18"],
)
def test_stages_in_a_row_are_the_network(make: Callable[[], nn.Sequential]) -> None:
    torch.manual_seed(0)
    network, x = make().eval(), torch.randn(2, 1, 11, 11)
    y = x
    for stage in cut(network):
        y = stage(y)
    assert torch.equal(y, network(x))


def test_a_residual_block_has_a_shortcut_without_parameters() -> None:
    block, x = ResidualBlock(2, 5, stride=2).eval(), torch.rand(1, 2, 7, 7)
    nn.init.zeros_(block.residual[3].weight)
    y = block(x)
    assert y.shape == (1, 5, 4, 4)
    assert torch.equal(y[:, :2], x[:, :, ::2, ::2])
    assert not y[:, 2:].any()


@pytest.mark.parametrize(("out", "stride"), [(2, 1), (2, 2), (5, 1), (5, 2)])
def test_a_pre_activation_block_projects_where_it_changes_shape(out: int, stride: int) -> None:
    block, x = PreActivationBlock(2, out, stride, dropout=0.5), torch.randn(3, 2, 6, 6)
    nn.init.zeros_(block.residual[-1].weight)
    if (out, stride) == (2, 1):
        assert torch.equal(block(x), x)
    else:
        assert torch.equal(block(x), block.shortcut(block.entry(x)))
        assert block.shortcut.weight.shape == (out, 2, 1, 1)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: resnet(depth=33), "cannot have 33 layers: give 6n \\+ 2, such as 32"),
        (lambda: wide_resnet(depth=4), "cannot have 4 layers: give 6n \\+ 4, such as 10"),
        (lambda: preact_resnet18(feature_multiplier=0.01), "convolution of 64 channels none"),
    ],
)
def test_impossible_sizes_are_refused(make: Callable[[], nn.Sequential], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()


@pytest.mark.parametrize(
    ("network", "change", "default"),
    [
        ("resnet32", {"dropout": 0.1}, 0.0),
        ("preact-resnet18", {"hidden_layers": 2}, 1),
        ("wrn-16-8", {"hidden_width": 3}, 1024),
        ("mlp", {"feature_multiplier": 0.5}, 1.0),
    ],
)
def test_settings_that_a_network_does_not_have_are_refused(
    network: str, change: dict[str, float], default: float
) -> None:
    (field, value) = next(iter(change.items()))
    message = f"model.{field} is {value}, and {network} has no such setting: leave it at {default}"
    with pytest.raises(UserError, match=re.escape(message)):
        build_network(Model(network=network, **change), (3, 32, 32), 10)


@pytest.mark.parametrize("strategy", ["greedy", "backprop"])
def test_blocks_learn(tmp_path: Path, strategy: str) -> None:
    torch.manual_seed(0)
    network = wide_resnet(1, CLASSES, depth=10, widen_factor=1, feature_multiplier=0.5, dropout=0.1)
    trainer = new_trainer(tmp_path, network, epochs=3, strategy=strategy, encoding="float32")
    records = trainer.fit(TRAIN, TEST)
    assert len(records) == 5
    assert records[-1].metrics.test_error_percent < 40  # chance is 67
    if strategy == "greedy":
        assert all(learned(tmp_path, record.stage) for record in records)


@pytest.mark.parametrize("mode", MICRO_MODES)
@pytest.mark.parametrize(
    "block",
    [ResidualBlock(8, 12, 2), PreActivationBlock(8, 8), PreActivationBlock(8, 12, 2)],
    ids=["residual", "pre-activation", "pre-activation, projected"],
)
def test_blocks_have_the_gradients_of_the_batch_in_every_mode(block: nn.Module, mode: Mode) -> None:
    learner = make_learner(deepcopy(block))
    batch = make_batch(learner)
    expected = trained(measured(learner, batch, StepMemory(Mode.PLAIN)))
    assert_same(trained(measured(learner, batch, StepMemory(mode, 5))), expected)


@pytest.mark.parametrize("mode", MICRO_MODES)
def test_a_block_has_them_together_with_the_output_layer(mode: Mode) -> None:
    end = resnet(num_classes=STEP_CLASSES, depth=8, feature_multiplier=0.25)[-1]
    learner = make_learner(end, Output(0.5))
    batch = make_batch(learner)
    expected = trained(measured(learner, batch, StepMemory(Mode.PLAIN)))
    assert_same(trained(measured(learner, batch, StepMemory(mode, 5))), expected)
