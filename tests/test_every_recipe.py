"""Every recipe, at its full size: each of its stages trains for two steps."""

import pytest
import torch

from greedy.build import build_loss, build_network, checked_shapes
from greedy.data import DATASETS
from greedy.errors import UserError
from greedy.losses import LocalLoss, Output
from greedy.models import Stage, StageShapes, cut, initialise
from greedy.recipes import Loss, Recipe, load, names
from greedy.source import Batch
from greedy.training.guard import Guard
from greedy.training.resolve import for_stage
from greedy.training.step import Learner, step

ENTRIES = {entry.name: entry for entry in DATASETS}
ROWS = 2


def is_built(loss: Loss) -> bool:
    try:
        build_loss(loss)
    except UserError:
        return False
    return True


def trained_alone(recipe: Recipe) -> bool:
    """Whether its stages are trained one at a time, with a loss that is built by now."""
    return recipe.training.strategy == "greedy" and is_built(recipe.loss)


def two_steps(
    recipe: Recipe, stage: Stage, shapes: StageShapes, loss: LocalLoss, classes: int
) -> None:
    initialise(stage, recipe.seed, is_output=isinstance(loss, Output))
    learner = Learner(stage, loss.heads(shapes.hidden, classes), loss, classes, "float32")
    rate = for_stage(recipe.training.learning_rate, stage.number)
    learner.optimizer = torch.optim.Adam(learner.parameters(), lr=rate, fused=True)
    learner.train()
    before = [parameter.detach().clone() for parameter in learner.parameters()]
    generator = torch.Generator().manual_seed(stage.number)
    inputs = torch.randn((ROWS, *shapes.input), generator=generator)
    dropout = stage.dropout
    mask = dropout and dropout.mask(ROWS, shapes.input, generator)
    batch = Batch(torch.arange(ROWS), inputs.__getitem__, mask)
    guard = Guard()
    for position in range(2):
        value, logits = step(learner, batch, guard, position)
        assert torch.isfinite(value)
        assert logits is None or logits.shape == (ROWS, classes)
    assert guard.step is None
    for parameter, first in zip(learner.parameters(), before, strict=True):
        assert torch.isfinite(parameter).all()
        assert not torch.equal(parameter, first)


@pytest.mark.parametrize("name", [name for name in names() if trained_alone(load(name))])
def test_every_stage_of_a_recipe_learns(name: str) -> None:
    """One stage is in memory at a time, as in training."""
    recipe = load(name)
    data = ENTRIES[recipe.data.name]
    stages = cut(build_network(recipe.model, data.shape, data.classes))
    shapes = checked_shapes(recipe, stages, data.shape, data.classes)
    loss = build_loss(recipe.loss)
    for shape in shapes:
        stage = stages.pop(0)
        own = loss if stages else Output(loss.output_scale)
        two_steps(recipe, stage, shape, own, data.classes)
