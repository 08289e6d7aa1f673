"""Mixing of rows and labels: what is mixed, with which shares, and where it is refused."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from command_line import refused, small_recipe
from small_training import CLASSES, SIDE, TEST, TRAIN, learned, network, new_trainer, weights
from test_exact_stages import make_batch, make_learner
from test_exact_step import MICRO_MODES, assert_same, measured
from torch import nn

from greedy import UserError
from greedy.data import Mixture, Mixup
from greedy.losses import Glob, Output, Pred
from greedy.models import cut, shapes
from greedy.recipes import load
from greedy.runs.choices import Mode, StepMemory
from greedy.steps.guard import Guard
from greedy.steps.step import Learner
from greedy.steps.strategies import together
from greedy.stores.source import Batch

ROWS = 6
CPU = torch.device("cpu")


def batch(depth: float = 0.0) -> Batch:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(ROWS, 1, SIDE, SIDE, generator=generator)
    shares = torch.linspace(0.5, 1, ROWS)
    return Batch(torch.arange(ROWS) % CLASSES, x.__getitem__, None, Mixture(shares, depth))


def mixed(values: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
    rows = [
        share * values[i] + (1 - share) * values[(i + 1) % len(values)]
        for i, share in enumerate(shares)
    ]
    return torch.stack(rows)


def learners(hidden) -> list[Learner]:
    stages = cut(network(dropout=0, hidden_layers=3))
    sizes = shapes(stages, (1, SIDE, SIDE))
    losses = [hidden] * 3 + [Output()]
    made = []
    for stage, size, loss in zip(stages, sizes, losses, strict=True):
        made.append(Learner(stage, loss.heads(size.hidden, CLASSES), loss, CLASSES, "float32"))
        made[-1].train()
    return made


def test_a_row_is_mixed_with_the_next_and_the_last_with_the_first() -> None:
    given = batch()
    shares = given.mixture.shares
    assert torch.allclose(given.inputs(), mixed(given.read(slice(None)), shares))
    (learner, *_) = learners(Pred())
    y = F.one_hot(given.labels, CLASSES).float()
    assert torch.allclose(learner.targets(given), mixed(y, shares))


@pytest.mark.parametrize("size", [1, 2, 4, 6])
def test_micro_batches_are_parts_of_the_mixed_batch(size: int) -> None:
    given = batch()
    slices = [slice(start, min(start + size, ROWS)) for start in range(0, ROWS, size)]
    parts = torch.cat([given.inputs(rows) for rows in slices])
    assert torch.equal(parts, given.inputs())


def test_shares_are_of_the_row_not_of_its_place() -> None:
    table = Mixup(2.0).draw(50, 0, 1, 0)
    rows = np.array([4, 40, 2])
    assert torch.equal(
        Mixup.mixture(table, rows, CPU).shares,
        torch.from_numpy(table[:, 0].astype(np.float32))[rows],
    )
    assert (Mixup(2.0).draw(50, 0, 1, 0) == table).all()
    for other in (Mixup(2.0).draw(50, 0, 1, 1), Mixup(2.0).draw(50, 1, 1, 0)):
        assert (other[:, 0] != table[:, 0]).all()


@pytest.mark.parametrize("alpha", [0.2, 1.0, 2.0])
def test_shares_have_the_distribution_of_the_stronger_one(alpha: float) -> None:
    shares, depths = Mixup(alpha).draw(20_000, 0, 1, 0).T
    drawn = np.random.default_rng(1).beta(alpha, alpha, 20_000)
    expected = np.maximum(drawn, 1 - drawn)
    assert shares.min() >= 0.5 and shares.max() <= 1
    for share in (0.1, 0.5, 0.9):
        assert np.quantile(shares, share) == pytest.approx(np.quantile(expected, share), abs=0.02)
    assert not depths.any()


def test_manifold_mixup_reaches_the_middle_of_a_network() -> None:
    depths = Mixup(2.0, manifold=True).draw(5_000, 0, 1, 0)[:, 1]
    counts = np.bincount([Mixture(torch.ones(1), depth).stage(10) for depth in depths])
    assert counts == pytest.approx([5_000 / 6] * 6, rel=0.15)


@pytest.mark.parametrize("depth", [0.0, 0.4, 0.9])
def test_manifold_mixup_is_autograd_through_the_mixed_layer(depth: float) -> None:
    trained, expected = learners(Glob()), learners(Glob())
    given = batch(depth)
    way = together("backprop", trained, 1, lambda parameters: torch.optim.SGD(parameters, 0.1))
    way.step(given, [None] * 4, Guard(), 0)

    x, shares = given.read(slice(None)), given.mixture.shares
    for number, learner in enumerate(expected):
        if number == int(3 * depth):
            x = mixed(x, shares)
        x = learner.stage(x)
    loss = F.cross_entropy(x, mixed(F.one_hot(given.labels, CLASSES).float(), shares))
    loss.backward()
    for learner, other in zip(trained, expected, strict=True):
        for ours, theirs in zip(learner.stage.parameters(), other.stage.parameters(), strict=True):
            assert torch.allclose(ours, theirs - 0.1 * theirs.grad, atol=1e-6)


# Runs


@pytest.mark.parametrize(
    ("strategy", "mixup"),
    [("greedy", "input"), ("joint", "input"), ("backprop", "input"), ("backprop", "manifold")],
)
def test_a_network_learns_from_mixed_rows(tmp_path: Path, strategy: str, mixup: str) -> None:
    settings = {"strategy": strategy, "loss": Pred(), "epochs": 4}
    plain = new_trainer(tmp_path / "plain", **settings).fit(TRAIN, TEST)
    records = new_trainer(tmp_path / "mixed", mixup=mixup, **settings).fit(TRAIN, TEST)
    for run, found in (("plain", plain), ("mixed", records)):
        assert found[-1].metrics.test_error_percent < 35  # chance is 67
        assert learned(tmp_path / run, len(found))
    first, other = weights(tmp_path / "plain", 1), weights(tmp_path / "mixed", 1)
    assert any(not torch.equal(first[key], other[key]) for key in first)


@pytest.mark.parametrize("mode", MICRO_MODES)
def test_mixing_does_not_depend_on_micro_batches(mode: Mode) -> None:
    learner = make_learner(nn.Conv2d(8, 6, 3), Pred(pool_target=32))
    rows = make_batch(learner)
    shares = torch.linspace(0.5, 1, len(rows.labels))
    mixed_rows = replace(rows, mixture=Mixture(shares))
    expected = measured(learner, mixed_rows, StepMemory(Mode.PLAIN))
    assert_same(measured(learner, mixed_rows, StepMemory(mode, 5)), expected)
    unmixed = measured(learner, rows, StepMemory(Mode.PLAIN))
    with pytest.raises(AssertionError):
        assert_same(unmixed, expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["loss.name=predsim"], "predsim needs one label a row"),
        (["loss.name=sim"], "sim needs one label a row"),
        (["loss.name=pred-bio"], "pred-bio needs one label a row"),
        (["training.strategy=glob+sim"], r"glob\+sim needs one label a row"),
        (["loss.name=pred", "data.mixup=manifold"], "set training.strategy to backprop"),
        (
            ["training.strategy=backprop", "data.mixup=manifold", "training.accumulate=2"],
            "training.accumulate to 1",
        ),
    ],
)
def test_mixed_labels_are_refused_where_nothing_takes_them(
    tmp_path: Path, changes: list[str], message: str
) -> None:
    recipe = tmp_path / "small.toml"
    recipe.write_text(small_recipe(data={"mixup": "input"}))
    settings = [part for change in changes for part in ("--set", change)]
    said = refused("train", "--recipe", recipe, "--run", tmp_path / "run", *settings)
    assert message.replace("\\", "") in said
    assert not (tmp_path / "run" / "stage1").exists()


def test_alpha_without_mixup_is_a_mistake() -> None:
    with pytest.raises(UserError, match=r"mixup_alpha is 2.* must be left out where data.mixup"):
        load("demo", ["data.mixup_alpha=2"])
    assert load("demo", ["data.mixup=input", "data.mixup_alpha=2"]).data.mixup_alpha == 2
