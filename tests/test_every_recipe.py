"""Every recipe, at full size, takes a training step: each stage, or all of them together. One
recipe of each kind computes values, the others only sizes on fake tensors. Stages that several
recipes share run once."""

from contextlib import nullcontext
from functools import partial

import pytest
import torch

from greedy.build.fitting import checked_shapes
from greedy.build.modules import build_loss, build_network
from greedy.data import DATASETS, Entry
from greedy.losses import Output
from greedy.losses.strategies import stage_losses
from greedy.memory.fake import fake_tensors, materialise
from greedy.models import Stage, StageShapes, cut, initialise
from greedy.recipes import Recipe, load, names
from greedy.steps.guard import Guard
from greedy.steps.step import Learner
from greedy.steps.strategies import Greedy, Strategy, together
from greedy.stores.source import Batch

IMAGENET = Entry("folder:imagenet", (3, 224, 224), 1_000, 1_281_167, 50_000, "as a folder")
ENTRIES = {entry.name: entry for entry in (*DATASETS, IMAGENET)}
ROWS, RATE = 2, 1e-3
trained: set[tuple] = set()


def batch_of(recipe: Recipe, stages: list[Stage], shapes: list[StageShapes]) -> tuple[Batch, list]:
    """Returns a batch of random inputs of the first stage, and masks for all stages."""
    generator = torch.Generator().manual_seed(stages[0].number)
    inputs = torch.randn((ROWS, *shapes[0].input), generator=generator)
    masks = [
        stage.dropout and stage.dropout.mask(ROWS, shape.input, generator)
        for stage, shape in zip(stages, shapes, strict=True)
    ]
    return Batch(torch.arange(ROWS), inputs.__getitem__), masks


def learners_of(
    recipe: Recipe,
    stages: list[Stage],
    shapes: list[StageShapes],
    losses: list,
    classes: int,
    numbers: bool,
) -> list[Learner]:
    learners = []
    for stage, shape, loss in zip(stages, shapes, losses, strict=True):
        zero = isinstance(loss, Output) and recipe.training.strategy != "backprop"
        if numbers:
            initialise(stage, recipe.seed, zero=zero)
        else:
            materialise(stage)
        heads = loss.heads(shape.hidden, classes)
        learners.append(Learner(stage, heads, loss, classes, "float32"))
        learners[-1].train()
    return learners


def two_steps(strategy: Strategy, batch: Batch, masks: list, classes: int) -> None:
    """Checks with values that every parameter changes and stays finite."""
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


def a_step_of_sizes(strategy: Strategy, batch: Batch, masks: list, classes: int) -> None:
    """Checks without values that every parameter gets a gradient and its moments."""
    for loss, logits in strategy.step(batch, masks, Guard(), 0):
        assert loss.shape == ()
        assert logits is None or logits.shape == (ROWS, classes)
    state = {p: s for each in strategy.optimizers for p, s in each.state.items()}
    for parameter in (p for each in strategy.learners for p in each.parameters()):
        assert parameter.grad is not None
        assert state[parameter]["exp_avg_sq"].shape == parameter.shape


def is_new(
    recipe: Recipe,
    stages: list[Stage],
    shapes: list[StageShapes],
    losses: list,
    classes: int,
    numbers: bool,
) -> bool:
    """Returns whether no earlier recipe had the same stages, heads, losses and sizes. A step with
    values counts as one of sizes."""
    training = recipe.training.strategy, recipe.training.accumulate
    with torch.device("meta"):
        heads = [
            repr(loss.heads(shape.hidden, classes))
            for loss, shape in zip(losses, shapes, strict=True)
        ]
    own = [(repr(stage), type(stage.dropout)) for stage in stages]
    kind = (*training, *own, *heads, *map(type, losses), *shapes, classes)
    known = (kind, True) in trained or (kind, numbers) in trained
    trained.add((kind, numbers))
    return not known


def train(recipe: Recipe, *, numbers: bool = True) -> None:
    """Trains the stages; those that train alone are in memory one at a time."""
    data, strategy = ENTRIES[recipe.data.name], recipe.training.strategy
    stages = cut(build_network(recipe.model, data.shape, data.classes))
    shapes = checked_shapes(recipe, stages, data.shape, data.classes)
    hidden = [shape.hidden for shape in shapes]
    losses = stage_losses(strategy, build_loss(recipe.loss), hidden)
    size = 1 if strategy == "greedy" else len(stages)
    while stages:
        own, stages = stages[:size], stages[size:]
        here, shapes = shapes[:size], shapes[size:]
        ways, losses = losses[:size], losses[size:]
        if is_new(recipe, own, here, ways, data.classes, numbers):
            with nullcontext() if numbers else fake_tensors():
                train_together(recipe, own, here, ways, data.classes, numbers)


def train_together(
    recipe: Recipe,
    stages: list[Stage],
    shapes: list[StageShapes],
    losses: list,
    classes: int,
    numbers: bool,
) -> None:
    learners = learners_of(recipe, stages, shapes, losses, classes, numbers)
    strategy = recipe.training.strategy
    adam = partial(torch.optim.Adam, lr=RATE, fused=True)
    if strategy == "greedy":
        learners[0].optimizer = adam(learners[0].parameters())
        way: Strategy = Greedy(learners[0])
    else:
        way = together(strategy, learners, recipe.training.accumulate, adam)
    steps = two_steps if numbers else a_step_of_sizes
    steps(way, *batch_of(recipe, stages, shapes), classes)


def narrowest() -> list[str]:
    """Returns the narrowest of all recipes that differ only in widths and in the size of images;
    wide residual networks also differ in depth. Those of ImageNet compute for minutes."""
    alike: dict[tuple, list[tuple[float, int, str, str]]] = {}
    for name in names():
        recipe = load(name)
        if recipe.data.name == IMAGENET.name:
            continue
        shape, strategy = ENTRIES[recipe.data.name].shape, recipe.training.strategy
        network = recipe.model.network
        key = network.split("-")[0], recipe.loss.name, strategy, shape[0]
        size = recipe.model.feature_multiplier or 1, shape[1]
        alike.setdefault(key, []).append((*size, network, name))
    return [min(each)[-1] for each in alike.values()]


@pytest.mark.parametrize("name", narrowest())
def test_the_narrowest_recipe_of_each_kind_learns(name: str) -> None:
    train(load(name))


@pytest.mark.parametrize("name", names())
def test_every_recipe_steps_at_its_full_size(name: str) -> None:
    train(load(name), numbers=False)
