"""The trained network, put together again from its stages."""

from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path

import torch
from torch import nn

from greedy.base.errors import UserError, no_stage
from greedy.base.files import read_tensors
from greedy.build.modules import build_network
from greedy.losses import LocalHeads, LocalLoss
from greedy.losses.strategies import stage_losses
from greedy.models import Shape, Stage, cut, shapes
from greedy.recipes import Recipe
from greedy.runs.directory import RunDirectory
from greedy.runs.record import ENCODER, HEADS, StageRecord, normalisation_of


class NoLocalClassifier(UserError):
    """There is no early exit after a stage."""


def stages_of(recipe: Recipe, data: StageRecord, model: nn.Sequential | None) -> list[Stage]:
    """The run's stages without their trained weights: of a copy of ``model``, or where there is
    none of the recipe's network on the meta device."""
    if model is None:
        model = build_network(recipe.model, data.row_shape, len(data.class_names))
    return cut(deepcopy(model), recipe.model.stage_layers)


def load_stage(run: RunDirectory, stage: Stage, device: torch.device) -> None:
    """Gives a stage its frozen weights from the run, checked against their digest."""
    directory, record = run.stage(stage.number), run.complete(stage.number)
    path = record.check_file(directory, ENCODER)
    if record.layers != stage.kinds:
        raise UserError(
            f"{directory} holds other layers than stage {stage.number} of this network: give "
            f"the network (--model) that the run was trained with"
        )
    _load(stage, path, f"stage {stage.number} of this network: give the network (--model)")
    stage.to(device).eval().requires_grad_(False)


def load_heads(run: RunDirectory, loss: LocalLoss, number: int, hidden: Shape) -> LocalHeads:
    """A stage's local heads with their trained weights from the run, checked against their
    digest; ``hidden`` is the shape of a row of its activation h."""
    record = run.complete(number)
    heads = loss.heads(hidden, len(record.class_names))
    path = record.check_file(run.stage(number), HEADS)
    _load(heads, path, "the heads of this local loss: give the loss")
    return heads.eval().requires_grad_(False)


def assemble(
    run: RunDirectory,
    loss: LocalLoss | None,
    model: nn.Sequential | None = None,
    *,
    until_stage: int | None = None,
) -> nn.Sequential:
    """The trained network as one plain ``nn.Sequential`` of torch's own modules, in float32 on
    the CPU and in evaluation mode.

    Takes images (B, C, H, W) as floats in [0, 1] (values as they are where the data set's were
    floats), gives logits (B, classes). Its first module normalises: a batch norm without
    parameters whose statistics are the data set's. ``until_stage`` N gives the early exit:
    stages 1 to N and stage N's local classifier. That alone needs ``loss``, the run's local loss.

    Raises:
        UserError: a stage is missing, stale or damaged, or has no local classifier; or an early
            exit is asked for without the loss.
    """
    return run.undisturbed(lambda: _assemble(run, loss, model, until_stage))


def _assemble(
    run: RunDirectory, loss: LocalLoss | None, model: nn.Sequential | None, until_stage: int | None
) -> nn.Sequential:
    data = run.complete(0)
    stages = stages_of(run.recipe, data, model)
    last = len(stages) if until_stage is None else until_stage
    if not 1 <= last <= len(stages):
        raise no_stage(last, len(stages))
    modules = [normalisation(run.recipe, data)]
    for stage in stages[:last]:
        load_stage(run, stage, torch.device("cpu"))
        modules += stage.modules_for_inference()
    if last < len(stages):
        if loss is None:
            raise UserError(
                f"the early exit after stage {last} needs the run's local loss: give it"
            )
        modules = modules[: len(modules) - len(stages[last - 1].pool)]  # the head sees h
        modules += local_classifier(run, loss, stages, last, data)
    return nn.Sequential(*modules).eval().requires_grad_(False)


def normalisation(recipe: Recipe, data: StageRecord) -> nn.Module:
    """The data set's normalisation of images (B, C, H, W), as the stages were trained on."""
    mean, std = (torch.tensor(values) for values in normalisation_of(recipe, data))
    module = nn.BatchNorm2d(len(mean), eps=0.0, affine=False)
    module.running_mean, module.running_var = mean, std.square()
    return module.eval()


def local_classifier(
    run: RunDirectory, loss: LocalLoss, stages: Sequence[Stage], number: int, data: StageRecord
) -> list[nn.Module]:
    """What a stage's early exit does with its activation h, as modules in order: gives logits
    (B, classes). ``loss`` is the run's local loss.

    Raises ``NoLocalClassifier`` if the stage was trained without one.
    """
    loss = stage_losses(run.recipe.training.strategy, loss, len(data.network))[number - 1]
    heads = load_heads(run, loss, number, shapes(stages[:number], data.row_shape)[-1].hidden)
    if not heads.modules_for_inference():
        raise NoLocalClassifier(
            f"stage {number} has no local classifier (its loss trains none), so there is no "
            f"early exit after it: leave out --until-stage"
        )
    return heads.modules_for_inference()


def _load(module: nn.Module, path: Path, what: str) -> None:
    try:
        module.load_state_dict(read_tensors(path), assign=True)
    except RuntimeError as error:
        raise UserError(f"{path} does not fit {what} that the run was trained with") from error
