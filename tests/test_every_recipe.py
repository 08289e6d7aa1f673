"""Every recipe, at its full size, trains for two steps: each stage, or all of them at once."""

from functools import partial

import pytest
import torch

from greedy.build import build_loss, build_network, checked_shapes
from greedy.data import DATASETS
from greedy.losses import Output
from greedy.models import Stage, StageShapes, cut, initialise
from greedy.recipes import Recipe, load, names
from greedy.source import Batch
from greedy.training.guard import Guard
from greedy.training.step import Learner
from greedy.training.strategies import Greedy, Strategy, losses_of, together

ENTRIES = {entry.name: entry for entry in DATASETS}
ROWS, RATE = 2, 1e-3


def batch_of(recipe: Recipe, stages: list[Stage], shapes: list[StageShapes]) -> tuple[Batch, list]:
    """A batch of the first stage's random inputs, and masks for all."""
    generator = torch.Generator().manual_seed(stages[0].number)
    inputs = torch.randn((ROWS, *shapes[0].input), generator=generator)
    masks = [
        stage.dropout and stage.dropout.mask(ROWS, shape.input, generator)
        for stage, shape in zip(stages, shapes, strict=True)
    ]
    return Batch(torch.arange(ROWS), inputs.__getitem__), masks


def learners_of(
    recipe: Recipe, stages: list[Stage], shapes: list[StageShapes], losses: list, classes: int
) -> list[Learner]:
    found = []
    for stage, shape, loss in zip(stages, shapes, losses, strict=True):
        zero = isinstance(loss, Output) and recipe.training.strategy != "backprop"
        initialise(stage, recipe.seed, zero=zero)
        heads = loss.heads(shape.hidden, classes)
        found.append(Learner(stage, heads, loss, classes, "float32"))
        found[-1].train()
    return found


def two_steps(strategy: Strategy, batch: Batch, masks: list, classes: int) -> None:
    parameters = [p for each in strategy.learners for p in each.parameters()]
    before = [parameter.detach().clone() for parameter in parameters]
    guard = Guard()
    for position in range(2):
        for loss, logits in strategy.step(batch, masks, guard, position):
            assert torch.isfinite(loss)
            assert logits is None or logits.shape == (ROWS, classes)
    assert guard.step is None
    for parameter, first in zip(parameters, before, strict=True):
        assert torch.isfinite(parameter).all()
        assert not torch.equal(parameter, first)


@pytest.mark.parametrize("name", names())
def test_every_recipe_learns(name: str) -> None:
    """Where stages train alone, one is in memory at a time, as in training."""
    recipe = load(name)
    data, strategy = ENTRIES[recipe.data.name], recipe.training.strategy
    stages = cut(build_network(recipe.model, data.shape, data.classes))
    shapes = checked_shapes(recipe, stages, data.shape, data.classes)
    losses = losses_of(strategy, build_loss(recipe.loss), len(stages))
    size = 1 if strategy == "greedy" else len(stages)
    while stages:
        own, stages = stages[:size], stages[size:]
        here, shapes = shapes[:size], shapes[size:]
        learners = learners_of(recipe, own, here, losses[:size], data.classes)
        losses = losses[size:]
        adam = partial(torch.optim.Adam, lr=RATE, fused=True)
        if strategy == "greedy":
            learners[0].optimizer = adam(learners[0].parameters())
            trained: Strategy = Greedy(learners[0])
        else:
            trained = together(strategy, learners, recipe.training.accumulate, adam)
        two_steps(trained, *batch_of(recipe, own, here), data.classes)
