"""Evaluation of every early exit of a network, in one pass through it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from greedy.base.devices import full_float32
from greedy.build.cut_network import OUTPUT
from greedy.losses import LocalLoss
from greedy.memory.forward import fit_forward
from greedy.models import Shape, Stage, StageShapes, shapes
from greedy.results.evaluation import Tally, budget_or_own, image_batches, require_split
from greedy.runs.directory import RunDirectory
from greedy.runs.network import (
    NoLocalClassifier,
    load_stage,
    local_classifier,
    normalisation_module,
    stages_of,
)
from greedy.runs.state import RunState


@dataclass(frozen=True)
class Exit:
    """The network up to a stage with that stage's local classifier; at the last stage, the whole
    network.

    Attributes:
        stage: the number of the stage.
        name: the name of the stage.
        error_percent: its error; ``None`` without a local classifier.
        loss: its mean cross-entropy; ``None`` without a local classifier.
        parameters: number of parameters of the stages up to this one, and of the classifier.
        operations: multiply-adds of their convolutions and linear layers for one image.
    """

    stage: int
    name: str
    error_percent: float | None
    loss: float | None
    parameters: int
    operations: int


@dataclass(frozen=True)
class Exits:
    """All exits of a network, evaluated on a split, in order; the last is the whole network."""

    split: str
    samples: int
    exits: Sequence[Exit]

    def points_lost(self, early: Exit) -> float:
        """Returns how many points of error an exit with a local classifier has more than the
        network."""
        whole = self.exits[-1]
        assert early.error_percent is not None and whole.error_percent is not None
        return early.error_percent - whole.error_percent

    def cheapest(self, lose: float) -> Exit | None:
        """Returns the early exit with the fewest operations among those that lose less than
        ``lose`` points of error, or ``None``."""
        early = (exit for exit in self.exits[:-1] if exit.error_percent is not None)
        close = [exit for exit in early if self.points_lost(exit) < lose]
        return min(close, key=lambda exit: exit.operations, default=None)


@full_float32()
@torch.no_grad()
def evaluate_exits(
    run: RunDirectory,
    loss: LocalLoss,
    model: nn.Module | None,
    split: str,
    device: torch.device,
    memory_budget: int | None = None,
) -> Exits:
    """Evaluates all exits of a trained network on the raw images of a split, in float32; each
    image goes through the network once.

    Args:
        loss: the run's local loss.
        model: its network, if that was built in Python.
        split: ``train`` or ``test``.
        memory_budget: bytes that the network may use on the device, by default those of the run's
            recipe; local classifiers are not counted. A network whose weights do not fit stays on
            the CPU.

    Raises:
        UserError: a stage is missing, stale or damaged, or there is no such split.
    """
    require_split(split)
    state = RunState.read(run)
    data, stages = state.complete_record(0), stages_of(state, model)
    stage_shapes = shapes(stages, data.row_shape)
    hidden = [shape.hidden for shape in stage_shapes]
    budget = budget_or_own(run, device, memory_budget)
    modules = (module for stage in stages for module in stage.modules_for_inference())
    forward = fit_forward(nn.Sequential(*modules), data.row_shape, budget, device.type)
    device = device if forward.resident else torch.device("cpu")

    def load() -> list[nn.Sequential | None]:
        state = RunState.read(run)
        for stage in stages:
            load_stage(state, stage, device)
        return [_classifier(state, loss, stage.number, hidden) for stage in stages[:-1]]

    classifiers = run.read_consistently(load)
    # The output layer's h may only be followed by pooling, which gives the logits.
    ends = (*classifiers, stages[-1].pool)
    heads = [None if head is None else head.to(device) for head in ends]
    tallies = [Tally.of(len(data.class_names)) for _ in stages]
    normalise = normalisation_module(run.recipe, data).to(device)
    store = run.open_store(0, split)
    for images, labels in image_batches(store, forward.rows, device):
        x = normalise(images)
        for stage, head, tally in zip(stages, heads, tallies, strict=True):
            h = stage.hidden(x)
            if head is not None:
                tally.add(head(h), labels)
            x = stage.pool(h)
    exits = list(_exits(stages, stage_shapes, heads, tallies))
    return Exits(split, store.rows, exits)


def _exits(
    stages: Sequence[Stage],
    stage_shapes: Sequence[StageShapes],
    heads: Sequence[nn.Sequential | None],
    tallies: Sequence[Tally],
) -> Iterator[Exit]:
    parameters = operations = 0
    for stage, shape, head, tally in zip(stages, stage_shapes, heads, tallies, strict=True):
        parameters += _parameters(stage)
        operations += shape.operations
        yield Exit(
            stage.number,
            OUTPUT if stage is stages[-1] else stage.name,
            None if head is None else tally.error_percent,
            None if head is None else tally.mean_loss,
            parameters + _parameters(head),
            operations + _operations(head, shape),
        )


def _classifier(
    state: RunState, loss: LocalLoss, number: int, hidden: Sequence[Shape]
) -> nn.Sequential | None:
    try:
        return nn.Sequential(*local_classifier(state, loss, number, hidden)).eval()
    except NoLocalClassifier:
        return None


def _parameters(module: nn.Module | None) -> int:
    return 0 if module is None else sum(parameter.numel() for parameter in module.parameters())


def _operations(head: nn.Sequential | None, shape: StageShapes) -> int:
    """Counts the operations of a local classifier as those of a stage that takes h."""
    if head is None:
        return 0
    return shapes([Stage(1, head, nn.Sequential())], shape.hidden)[0].operations
