"""The start of a stage's training: first weights, local heads, optimiser, schedule."""

from collections.abc import Set as AbstractSet

import torch
from torch import nn

from greedy.base.ranks import ALONE, Ranks
from greedy.losses import LocalLoss
from greedy.memory.peaks import OptimizerFactory
from greedy.models import Stage, StageShapes, initialise, seeded
from greedy.models.memory_format import placed
from greedy.recipes import Recipe
from greedy.recipes.per_stage import for_stage
from greedy.runs.choices import Choices
from greedy.steps.moments import make_moments
from greedy.steps.optimizers import decay_groups, make_optimizer
from greedy.steps.scaling import LossScale
from greedy.steps.step import Learner
from greedy.training.resolve import graphs
from greedy.training.schedule import Cosine, Milestones, Patience, Schedule, set_first_rates


def new_learner(
    stage: Stage,
    shapes: StageShapes,
    loss: LocalLoss,
    num_classes: int,
    recipe: Recipe,
    choices: Choices,
    device: torch.device,
    *,
    zero: bool,
) -> Learner:
    """Makes a learner on a device with its first weights and heads, each drawn from a stream of
    random numbers named after the stage. With ``zero`` the weights start at zero, as those of an
    output layer do."""
    initialise(stage, recipe.seed, zero=zero)
    with seeded(recipe.seed, stage.number, "heads"):
        heads = loss.heads(shapes.hidden, num_classes)
    return Learner(
        placed(stage, device),
        placed(heads, device),
        loss,
        num_classes,
        choices.precision,
        scale=LossScale().to(device) if choices.precision == "float16" else None,
        compiled_rows=recipe.training.batch_size if choices.compile else 0,
        graph_rows=recipe.training.batch_size if graphs(recipe, choices, device) else 0,
        unfolds=choices.unfold,
        memory=choices.memory,
        shape=shapes.hidden,
    )


def new_optimizer(
    parameters: list[nn.Parameter],
    recipe: Recipe,
    number: int,
    factory: OptimizerFactory | None,
    without_decay: AbstractSet[nn.Parameter] = frozenset(),
    *,
    own_rates: bool = False,
    ranks: Ranks = ALONE,
) -> torch.optim.Optimizer:
    """Makes the optimiser of stage ``number``: the factory's if there is one, else the recipe's
    with its moments. All groups begin at the recipe's rate, or with ``own_rates`` at their own.
    ``without_decay`` are parameters that the recipe's weight decay leaves alone, ``ranks`` the
    processes that train the stage together."""
    rate = for_stage(recipe.training.learning_rate, number)
    if factory is not None:
        optimizer = factory(parameters)
        set_first_rates([optimizer], None if own_rates else rate)
    else:
        groups = decay_groups(parameters, without_decay) if recipe.training.weight_decay else None
        place = recipe.memory.optimizer_state
        optimizer = make_optimizer(
            recipe.training,
            groups or parameters,
            rate,
            on_host=place == "host",
            sharers=ranks if place == "sharded" else ALONE,
        )
    make_moments(optimizer, number)
    return optimizer


def new_schedule(recipe: Recipe, number: int) -> Schedule:
    """Makes the learning-rate schedule of stage ``number``."""
    training = recipe.training
    rate = for_stage(training.learning_rate, number)
    if training.patience:
        return Patience(rate, training.lr_decay, training.patience, warmup=training.warmup_epochs)
    if training.schedule == "cosine":
        return Cosine(rate, for_stage(training.epochs, number), training.warmup_epochs)
    milestones = training.milestones or []
    if milestones and isinstance(milestones[0], list):
        milestones = milestones[number - 1]
    return Milestones(rate, training.lr_decay, milestones, training.warmup_epochs)
