"""How error falls with depth: every early exit of a network, in one pass through it."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from greedy.base.devices import full_float32
from greedy.base.errors import UserError
from greedy.losses import LocalLoss
from greedy.memory.choice import memory_budget as memory_budget_of
from greedy.memory.forward import fit_forward
from greedy.models import Stage, StageShapes, shapes
from greedy.results.evaluation import raw_to_float
from greedy.runs.directory import SPLITS, RunDirectory
from greedy.runs.network import (
    NoLocalClassifier,
    load_stage,
    local_classifier,
    normalisation_module,
    stages_of,
)
from greedy.runs.record import StageRecord


@dataclass(frozen=True)
class Exit:
    """The network up to a stage and that stage's local classifier, or with the last stage the
    whole network.

    Attributes:
        error_percent, loss: error and mean cross-entropy; ``None`` without a local classifier.
        parameters: of all stages up to here, and of the classifier.
        operations: their multiply-adds for an image, of convolutions and linear layers.
    """

    stage: int
    name: str
    error_percent: float | None
    loss: float | None
    parameters: int
    operations: int


@dataclass(frozen=True)
class Exits:
    """Those of a network on a split, in order; the last one is the whole network."""

    split: str
    samples: int
    exits: Sequence[Exit]

    def lost(self, early: Exit) -> float:
        """Points of error that an exit with a local classifier loses against the network."""
        whole = self.exits[-1]
        assert early.error_percent is not None and whole.error_percent is not None
        return early.error_percent - whole.error_percent

    def cheapest(self, lose: float) -> Exit | None:
        """The early exit of the fewest operations among those that lose less than ``lose`` points
        of error, if there is one."""
        early = (each for each in self.exits[:-1] if each.error_percent is not None)
        near = [each for each in early if self.lost(each) < lose]
        return min(near, key=lambda each: each.operations, default=None)


@full_float32()
@torch.no_grad()
def evaluate_exits(
    run: RunDirectory,
    loss: LocalLoss,
    model: nn.Sequential | None,
    split: str,
    device: torch.device,
    memory_budget: int | None = None,
) -> Exits:
    """Evaluates all exits of a trained network on the raw images of a split, in float32; each
    image goes through the network once. ``loss`` is the run's local loss, ``model`` its network
    where that was built in Python. The network takes at most ``memory_budget`` bytes on the
    device, by default those of the run's recipe, and its classifiers their own besides; a network
    whose weights do not fit them stays on the CPU.

    Raises ``UserError`` if a stage is missing, stale or damaged.
    """
    if split not in SPLITS:
        raise UserError(f"{split!r} is not a split: use {' or '.join(SPLITS)}")
    data = run.complete_record(0)
    stages = stages_of(run.recipe, data, model)
    budget = memory_budget_of(run.recipe, device) if memory_budget is None else memory_budget
    modules = (each for stage in stages for each in stage.modules_for_inference())
    forward = fit_forward(nn.Sequential(*modules), data.row_shape, budget, device.type)
    device = device if forward.resident else torch.device("cpu")

    def loaded() -> list[nn.Sequential | None]:
        for stage in stages:
            load_stage(run, stage, device)
        return [_classifier(run, loss, stages, stage.number, data) for stage in stages[:-1]]

    classifiers = run.read_consistently(loaded)
    # All that may follow the output layer's h is pooling, and what comes of it are the logits.
    ends = (*classifiers, stages[-1].pool)
    heads = [None if each is None else each.to(device) for each in ends]
    tallies = [_Tally() for _ in stages]
    normalise = normalisation_module(run.recipe, data).to(device)
    store = run.open_store(0, split)
    starts = range(0, store.rows, forward.rows)
    for start, images in zip(starts, store.batches(0, forward.rows), strict=True):
        labels = torch.from_numpy(store.labels[start : start + len(images)]).to(device)
        x = normalise(raw_to_float(images, device))
        for stage, head, tally in zip(stages, heads, tallies, strict=True):
            h = stage.hidden(x)
            if head is not None:
                tally.add(head(h), labels)
            x = stage.pool(h)
    exits = list(_exits(stages, shapes(stages, data.row_shape), heads, tallies, store.rows))
    return Exits(split, store.rows, exits)


def _exits(
    stages: Sequence[Stage],
    stage_shapes: Sequence[StageShapes],
    heads: Sequence[nn.Sequential | None],
    tallies: Sequence["_Tally"],
    rows: int,
) -> Iterator[Exit]:
    parameters = operations = 0
    for stage, shape, head, tally in zip(stages, stage_shapes, heads, tallies, strict=True):
        parameters += _parameters(stage)
        operations += shape.operations
        yield Exit(
            stage.number,
            "output" if stage is stages[-1] else stage.name,
            None if head is None else 100 * tally.wrong / rows,
            None if head is None else tally.loss / rows,
            parameters + _parameters(head),
            operations + _operations(head, shape),
        )


@dataclass
class _Tally:
    loss: float = 0.0
    wrong: int = 0

    def add(self, logits: Tensor, labels: Tensor) -> None:
        self.loss += float(F.cross_entropy(logits, labels, reduction="sum"))
        self.wrong += int((logits.argmax(dim=1) != labels).sum())


def _classifier(
    run: RunDirectory, loss: LocalLoss, stages: Sequence[Stage], number: int, data: StageRecord
) -> nn.Sequential | None:
    try:
        return nn.Sequential(*local_classifier(run, loss, stages, number, data)).eval()
    except NoLocalClassifier:
        return None


def _parameters(module: nn.Module | None) -> int:
    return 0 if module is None else sum(each.numel() for each in module.parameters())


def _operations(head: nn.Sequential | None, shape: StageShapes) -> int:
    """Operations of a local classifier, counted as those of a stage that takes h."""
    if head is None:
        return 0
    return shapes([Stage(1, head, nn.Sequential())], shape.hidden)[0].operations
