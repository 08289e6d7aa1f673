"""The facts about a run that a report shows, from its records and its network."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from greedy.base.commands import command
from greedy.build.cut_network import CutNetwork
from greedy.build.modules import build_loss
from greedy.losses import Glob, LocalLoss
from greedy.memory.baselines import baselines
from greedy.models import shapes
from greedy.recipes import Recipe, departures
from greedy.recipes.networks import needs_code
from greedy.recipes.per_stage import for_stage
from greedy.report.mistakes import TestResult, classify_test_images
from greedy.report.repeating import commands
from greedy.results.curves import Curve, curves_so_far, run_names
from greedy.results.similarity import BatchSimilarity, similarity_by_stage
from greedy.runs.directory import RunDirectory
from greedy.runs.network import assemble, stages_of
from greedy.runs.record import StageRecord
from greedy.runs.state import RunState, StageState
from greedy.runs.status import DiskUse, StageStatus, disk_use, status
from greedy.steps.optimizers import factory


@dataclass(frozen=True)
class StoreFacts:
    """A store that a run has written. ``kept`` says whether it still exists; bytes and values are
    those of both splits."""

    stage: int
    name: str
    encoding: str
    views: int
    bytes: int
    values: int
    kept: bool


@dataclass(frozen=True)
class RunFacts:
    """The facts about one run. Unknown facts are ``None`` or empty, and ``missing`` says why.

    Attributes:
        name: a name that differs from those of the other runs on the page.
        recipe: the run's recipe.
        stages: the state of all stages, from 1 on.
        records: the records of the finished stages, stage 0 included, by number.
        curves: errors over epochs, for each stage that has them.
        departures: recipe fields that differ from those of the paper's experiment.
        baselines: peak memory in bytes of a step by other ways of training, named as in
            ``BASELINES``.
        stores: the stores of the images and of the finished stages.
        disk: the bytes on disk, and those written in all.
        similarity: similarity matrices of one test batch after each finished stage.
        test: the assembled network's classification of the test images.
        commands: shell commands that repeat the run.
        missing: sentences that say which facts are not known, and why.
    """

    name: str
    recipe: Recipe
    stages: Sequence[StageStatus]
    records: Mapping[int, StageRecord]
    curves: Sequence[Curve]
    departures: Sequence[str]
    baselines: Mapping[str, int]
    stores: Sequence[StoreFacts]
    disk: DiskUse
    similarity: BatchSimilarity | None
    test: TestResult | None
    commands: Sequence[str]
    missing: Sequence[str]

    @property
    def at_once(self) -> bool:
        """Whether all stages train at the same time, so that memory and time are the network's."""
        return self.recipe.training.strategy != "greedy"

    @property
    def class_names(self) -> list[str]:
        """The names of all classes."""
        return self.records[0].class_names

    @property
    def trained(self) -> list[StageRecord]:
        """The records of the trained stages."""
        return [record for number, record in self.records.items() if number]

    @property
    def device(self) -> str:
        """The devices on which the stages were trained, in words; empty before the first is."""
        return " and ".join(dict.fromkeys(record.device for record in self.trained))

    @property
    def precisions(self) -> list[str]:
        """The precisions in which they were trained, each once."""
        return list(dict.fromkeys(record.choices.precision for record in self.trained))

    @property
    def versions(self) -> Mapping[str, str]:
        """Package versions with which the last finished stage was trained."""
        return self.trained[-1].versions if self.trained else {}

    def epochs(self, stage: int) -> int:
        """Returns the number of epochs of a stage, at most, if training can end early."""
        epochs: int = for_stage(self.recipe.training.epochs, stage)
        return epochs

    @property
    def seconds(self) -> float | None:
        """Seconds of training and of writing stores so far."""
        seconds = [stage.seconds for stage in self.stages if stage.seconds is not None]
        if not seconds:
            return None
        return max(seconds) if self.at_once else sum(seconds)

    @property
    def step_memory_bytes(self) -> int | None:
        """Counted bytes of the stage whose step takes most."""
        counted = [size for stage in self.stages if (size := stage.step_memory_bytes) is not None]
        return max(counted, default=None)


def facts_of(
    runs: Sequence[RunDirectory],
    device: torch.device,
    model: nn.Module | None = None,
    loss: LocalLoss | None = None,
) -> list[RunFacts]:
    """Gathers the facts about each run.

    Args:
        device: where finished networks classify their test images.
        model: the network of runs whose network was built in Python or is what a function returns.
        loss: the local loss of runs whose loss was written in Python. Without it some facts about
            them are not known.

    Raises:
        UserError: a run is damaged, or its network is not known.
    """
    return [
        _facts(run, name, device, model if needs_code(run.recipe.model.network) else None, loss)
        for run, name in zip(runs, run_names(runs), strict=True)
    ]


def _facts(
    run: RunDirectory,
    name: str,
    device: torch.device,
    model: nn.Module | None,
    loss: LocalLoss | None,
) -> RunFacts:
    recipe, state = run.recipe, RunState.read(run)
    if recipe.loss.name != "python":
        loss = build_loss(recipe.loss)
    stages = status(state)
    numbers = range(len(stages) + 1)
    records = {n: record for n in numbers if (record := state.record(n)) is not None}
    finished = [stage.stage for stage in stages if stage.state == "complete"]
    has_data = state.stage_state(0) == "complete"
    complete = bool(stages) and len(finished) == len(stages)
    # The whole network has no local loss in it, so any loss does.
    network = assemble(run, loss or Glob(), model) if complete else None
    return RunFacts(
        name=name,
        recipe=recipe,
        stages=stages,
        records=records,
        curves=curves_so_far(run),
        departures=departures(recipe) if recipe.paper else [],
        baselines=_baselines(state, model, loss) if has_data and loss else {},
        stores=_stores(state, records),
        disk=disk_use(state),
        similarity=similarity_by_stage(run, loss, model) if 1 in finished else None,
        test=classify_test_images(run, network, device) if network else None,
        commands=commands(run),
        missing=_missing(run, stages, loss),
    )


def _baselines(state: RunState, model: nn.Module | None, loss: LocalLoss) -> Mapping[str, int]:
    data, stages = state.complete_record(0), stages_of(state, model)
    along = shapes(stages, data.row_shape)
    network = CutNetwork(stages, along, loss, len(data.class_names))
    training = state.run.recipe.training
    return baselines(network, training.batch_size, factory(training))


def _stores(state: RunState, records: Mapping[int, StageRecord]) -> list[StoreFacts]:
    return [
        StoreFacts(
            stage=number,
            name="images" if number == 0 else record.name,
            encoding=record.store.encoding,
            views=record.store.views,
            bytes=record.store.bytes,
            values=record.store.values,
            kept=state.has_store(number),
        )
        for number, record in records.items()
        if record.store
    ]


def _missing(run: RunDirectory, stages: Sequence[StageStatus], loss: LocalLoss | None) -> list[str]:
    missing = []
    remedy = f"{command('train', '--run', run.path)} resumes it"
    if not stages:
        missing.append(f"The run has no data yet, so there is nothing to show: {remedy}.")
    unfinished: dict[StageState, str] = {
        "training": "in training",
        "pending": "not begun",
        "stale": "stale, since an earlier stage was trained again or settings were changed",
    }
    for state, words in unfinished.items():
        numbers = [str(stage.stage) for stage in stages if stage.state == state]
        if numbers:
            which = (
                f"Stage {numbers[0]} is"
                if len(numbers) == 1
                else f"Stages {', '.join(numbers)} are"
            )
            missing.append(f"{which} {words}.")
    if any(stage.state != "complete" for stage in stages):
        missing.append(
            f"The network is not finished, so it has no test error, no confusion matrix and no "
            f"wrong images: {remedy}."
        )
    if loss is None:
        missing.append(
            "The local loss was written in Python and is not known here, so the memory of other "
            "ways of training is not counted, and the similarity matrices are those of activations."
        )
    return missing
