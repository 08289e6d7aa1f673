"""What a stage begins its training with: first weights, local heads, optimiser, schedule."""

from typing import Any, TypeVar

import torch
from torch import nn

from greedy.base.devices import preferred_layout
from greedy.losses import LocalLoss
from greedy.memory.peaks import OptimizerFactory
from greedy.models import Stage, StageShapes, initialise, seeded
from greedy.recipes import Recipe
from greedy.recipes.per_stage import for_stage
from greedy.runs.choices import Mode, StepMemory
from greedy.steps.host_adam import HostAdam
from greedy.steps.moments import make_moments
from greedy.steps.scaling import LossScale
from greedy.steps.step import Learner
from greedy.training.resolve import graphs
from greedy.training.schedule import Milestones, Patience, Schedule, set_first_rates

Module = TypeVar("Module", bound=nn.Module)


def new_learner(
    stage: Stage,
    shapes: StageShapes,
    loss: LocalLoss,
    num_classes: int,
    recipe: Recipe,
    resolved: dict[str, Any],
    device: torch.device,
    *,
    zero: bool,
) -> Learner:
    """A stage on a device with its first weights and its heads, both drawn from streams of their
    own. ``zero`` for an output layer whose weight starts there."""
    initialise(stage, recipe.seed, zero=zero)
    with seeded(recipe.seed, stage.number, "heads"):
        heads = loss.heads(shapes.hidden, num_classes)
    return Learner(
        placed(stage, device),
        placed(heads, device),
        loss,
        num_classes,
        resolved["precision"],
        scale=LossScale().to(device) if resolved["precision"] == "float16" else None,
        compiled_rows=recipe.training.batch_size if resolved.get("compile") else 0,
        graph_rows=recipe.training.batch_size if graphs(recipe, resolved, device) else 0,
        memory=StepMemory(Mode(resolved["memory_mode"]), resolved["micro_batch"]),
        shape=shapes.hidden,
    )


def placed(module: Module, device: torch.device) -> Module:
    """A module moved to a device, the weights of its convolutions as they are best laid out."""
    module.to(device)
    for parameter in module.parameters():
        parameter.data = preferred_layout(parameter.data)
    return module


def new_optimizer(
    parameters: list[nn.Parameter],
    recipe: Recipe,
    number: int,
    factory: OptimizerFactory | None,
    *,
    own_rates: bool = False,
) -> torch.optim.Optimizer:
    """The optimiser of stage ``number``: by a factory if there is one, else Adam. All its groups
    begin at the recipe's rate, unless they are to begin at their own. Adam has its moments."""
    rate = for_stage(recipe.training.learning_rate, number)
    if factory is not None:
        optimizer = factory(parameters)
        set_first_rates([optimizer], None if own_rates else rate)
    elif recipe.memory.optimizer_state == "host":
        optimizer = HostAdam(parameters, lr=rate)
    else:
        optimizer = torch.optim.Adam(parameters, lr=rate, fused=True)
    make_moments(optimizer, number)
    return optimizer


def new_schedule(recipe: Recipe, number: int) -> Schedule:
    """The learning rate of stage ``number``."""
    training = recipe.training
    rate = for_stage(training.learning_rate, number)
    if training.patience:
        return Patience(rate, training.lr_decay, training.patience)
    milestones = training.milestones or []
    if milestones and isinstance(milestones[0], list):
        milestones = milestones[number - 1]
    return Milestones(rate, training.lr_decay, milestones)
