"""The trained network, assembled from its stages."""

from collections.abc import Sequence
from copy import deepcopy
from itertools import zip_longest
from pathlib import Path

import torch
from torch import nn

from greedy.base.errors import UserError, no_stage
from greedy.base.files import read_tensors
from greedy.base.versions import versions
from greedy.build.cut_network import OUTPUT, cut_as
from greedy.build.modules import build_network
from greedy.losses import LocalHeads, LocalLoss
from greedy.losses.strategies import stage_losses
from greedy.models import Shape, Stage, sequential, shapes
from greedy.models.memory_format import placed
from greedy.recipes import Recipe
from greedy.runs.directory import RunDirectory
from greedy.runs.record import ENCODER, HEADS, StageRecord, channel_moments, same_kinds
from greedy.runs.state import RunState


class NoLocalClassifier(UserError):
    """A stage has no local classifier, so there is no early exit after it."""


def network_of(state: RunState, model: nn.Module | None) -> nn.Sequential:
    """Returns the run's network without its trained weights: that of ``model``, or if that is
    ``None`` the recipe's. Raises ``UserError`` unless stage 0 is complete."""
    data, recipe = state.complete_record(0), state.run.recipe
    if model is not None:
        return sequential(model, data.row_shape)
    return build_network(recipe.model, data.row_shape, len(data.class_names), recipe.seed)


def stages_of(state: RunState, model: nn.Module | None) -> list[Stage]:
    """Returns the run's stages without their trained weights, cut from a copy of ``network_of``.

    Raises ``UserError`` if they are others than those with which the run was begun.
    """
    network, data = deepcopy(network_of(state, model)), state.complete_record(0)
    stages = cut_as(state.run.recipe.model, network, data.row_shape)
    names = [*(stage.name for stage in stages[:-1]), OUTPUT]
    for number, (begun, now) in enumerate(zip_longest(data.network, names, fillvalue="none"), 1):
        if begun != now:
            raise UserError(
                f"stage {number} is {now} in this network and {begun} in {state.run.path}: give "
                f"the network (--model) that the run was begun with"
            )
    return stages


def stage_weights(state: RunState, stage: Stage) -> Path:
    """Returns the file of a stage's frozen weights, checked against its digest.

    Raises ``UserError`` if it is missing or damaged, or of other layers than ``stage`` has.
    """
    record, directory = state.complete_record(stage.number), state.run.stage_dir(stage.number)
    path = record.check_file(directory, ENCODER)
    # Another release may write arguments in another way.
    is_other_torch = record.versions.get("torch") != versions()["torch"]
    if not same_kinds(record.layers, stage.kinds, classes_only=is_other_torch):
        raise UserError(
            f"{directory} holds other layers than stage {stage.number} of this network: give "
            f"the network (--model) that the run was trained with"
        )
    return path


def load_stage(state: RunState, stage: Stage, device: torch.device) -> None:
    """Loads a stage's frozen weights from the run. Raises ``UserError`` as ``stage_weights`` does,
    and if they do not fit the stage."""
    path = stage_weights(state, stage)
    _load(stage, path, f"stage {stage.number} of this network: give the network (--model)")
    placed(stage, device).eval().requires_grad_(False)


def load_heads(state: RunState, loss: LocalLoss, number: int, hidden: Shape) -> LocalHeads:
    """Returns a stage's local heads with their trained weights from the run, checked against their
    digest. ``hidden`` is the shape of a row of its activation h.

    Raises ``UserError`` if they are missing, damaged, or those of another loss.
    """
    record = state.complete_record(number)
    heads = loss.heads(hidden, len(record.class_names))
    path = record.check_file(state.run.stage_dir(number), HEADS)
    _load(heads, path, "the heads of this local loss: give the loss")
    return heads.eval().requires_grad_(False)


def assemble(
    run: RunDirectory,
    loss: LocalLoss | None,
    model: nn.Module | None = None,
    *,
    until_stage: int | None = None,
) -> nn.Sequential:
    """Returns the trained network as one ``nn.Sequential`` of torch's modules, in float32 on the
    CPU and in evaluation mode.

    It maps images (B, C, H, W), floats in [0, 1] (unscaled if the data set's are floats), to logits
    (B, classes). Its first module normalises: a batch norm that is not trained, with the data set's
    statistics.

    Args:
        run: the run, whose stages are complete.
        loss: the run's local loss, needed only for an early exit.
        model: the network that the run was trained with, if it was given in Python.
        until_stage: N for the early exit of stages 1 to N and stage N's local classifier.

    Raises:
        UserError: a stage is missing, stale or damaged, or has no local classifier; or an early
            exit is asked for without the loss.
    """
    return run.read_consistently(lambda: _assemble(RunState.read(run), loss, model, until_stage))


def _assemble(
    state: RunState, loss: LocalLoss | None, model: nn.Module | None, until_stage: int | None
) -> nn.Sequential:
    stages = stages_of(state, model)
    last = len(stages) if until_stage is None else until_stage
    if not 1 <= last <= len(stages):
        raise no_stage(last, len(stages))
    modules = [normalisation_module(state.run.recipe, state.complete_record(0))]
    for stage in stages[:last]:
        load_stage(state, stage, torch.device("cpu"))
        modules += stage.modules_for_inference()
    if last < len(stages):
        if loss is None:
            raise UserError(
                f"the early exit after stage {last} needs the run's local loss: give it"
            )
        modules = modules[: len(modules) - len(stages[last - 1].pool)]  # heads take h, unpooled
        row_shape = state.complete_record(0).row_shape
        hidden = [shape.hidden for shape in shapes(stages, row_shape)]
        modules += local_classifier(state, loss, last, hidden)
    return nn.Sequential(*modules).eval().requires_grad_(False)


def normalisation_module(recipe: Recipe, data: StageRecord) -> nn.Module:
    """Returns the module that normalises images (B, C, H, W) as in training."""
    mean, std = (torch.tensor(values) for values in channel_moments(recipe, data))
    module = nn.BatchNorm2d(len(mean), eps=0.0, affine=False)
    module.running_mean, module.running_var = mean, std.square()
    limits = torch.finfo(torch.float32)
    if not ((module.running_var >= limits.tiny) & (module.running_var <= limits.max)).all():
        module = nn.BatchNorm2d(len(mean), eps=0.0)  # of data in units of 1e-20, say
        module.running_mean, module.weight.data = mean, 1 / std
    return module.eval()


def local_classifier(
    state: RunState, loss: LocalLoss, number: int, hidden: Sequence[Shape]
) -> list[nn.Module]:
    """Returns the modules, in order, that map a stage's activation h to logits (B, classes).

    Args:
        loss: the run's local loss.
        hidden: the shape of a row of h for each stage of the network.

    Raises:
        NoLocalClassifier: the stage was trained without one.
    """
    loss = stage_losses(state.run.recipe.training.strategy, loss, hidden)[number - 1]
    heads = load_heads(state, loss, number, hidden[number - 1])
    if not heads.modules_for_inference():
        raise NoLocalClassifier(
            f"stage {number} has no local classifier (its loss trains none), so there is no "
            f"early exit after it: leave out --until-stage"
        )
    return heads.modules_for_inference()


def _load(module: nn.Module, path: Path, target: str) -> None:
    try:
        module.load_state_dict(read_tensors(path), assign=True)
    except RuntimeError as error:
        raise UserError(f"{path} does not fit {target} that the run was trained with") from error
