"""What a report says of a run, as its own records and its network have it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from greedy.base.commands import command
from greedy.build.modules import build_loss
from greedy.losses import Glob, LocalLoss
from greedy.memory.baselines import baselines
from greedy.models import shapes
from greedy.recipes import Recipe, departures
from greedy.recipes.per_stage import for_stage
from greedy.report.mistakes import TestResult, classify_test_images
from greedy.report.repeating import commands
from greedy.results.curves import Curve, curves_so_far, run_names
from greedy.results.similarity import BatchSimilarity, similarity_by_stage
from greedy.runs.directory import RunDirectory, State
from greedy.runs.network import assemble, stages_of
from greedy.runs.record import StageRecord
from greedy.runs.status import DiskUse, StageStatus, disk_use, status


@dataclass(frozen=True)
class StoreFacts:
    """A store that a run has written. ``kept`` says whether it is still there; bytes are those of
    both splits."""

    stage: int
    name: str
    encoding: str
    views: int
    bytes: int
    values: int
    kept: bool


@dataclass(frozen=True)
class RunFacts:
    """One run. What there is nothing to tell of is ``None`` or empty, and ``missing`` says why.

    Attributes:
        name: that tells it from the other runs of the page.
        stages: the trained ones and those to come, from 1 on.
        records: of the finished stages by number, that of stage 0 among them.
        curves: errors over epochs, of each stage that has them.
        departures: fields of the recipe in which it differs from the one of the paper's figure.
        baselines: peaks in bytes of a step by other means, named as in ``BASELINES``.
        stores: of the images and the finished stages.
        similarity: of one test batch after each finished stage.
        test: the assembled network on the test images.
        commands: lines of a shell that repeat the run.
        missing: sentences.
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
        """The records without that of the images."""
        return [record for number, record in self.records.items() if number]

    @property
    def device(self) -> str:
        """The devices on which the stages were trained, in words; empty as long as none is."""
        return " and ".join(dict.fromkeys(record.device for record in self.trained))

    @property
    def precisions(self) -> list[str]:
        """The precisions in which they were trained, each once."""
        return list(dict.fromkeys(record.resolved["precision"] for record in self.trained))

    @property
    def versions(self) -> Mapping[str, str]:
        """Versions by package with which the last of them was trained."""
        return self.trained[-1].versions if self.trained else {}

    def epochs(self, stage: int) -> int:
        """The most epochs for which a stage is trained."""
        found: int = for_stage(self.recipe.training.epochs, stage)
        return found

    @property
    def seconds(self) -> float | None:
        """Seconds of training and writing stores, as far as the run has come."""
        known = [each.seconds for each in self.stages if each.seconds is not None]
        if not known:
            return None
        return max(known) if self.at_once else sum(known)

    @property
    def step_memory_bytes(self) -> int | None:
        """Bytes, counted, of the stage whose step takes most."""
        known = [b for each in self.stages if (b := each.step_memory_bytes) is not None]
        return max(known, default=None)


def facts_of(
    runs: Sequence[RunDirectory],
    device: torch.device,
    model: nn.Sequential | None = None,
    loss: LocalLoss | None = None,
) -> list[RunFacts]:
    """The facts of each run. Networks that are finished classify their test images on ``device``.

    ``model`` is the network of the runs whose recipe says ``python``; ``loss`` the local loss of
    those whose loss was written in Python, without which some things are not known of them.

    Raises ``UserError`` for a damaged run, and for one whose network is not known.
    """
    return [
        _facts(run, name, device, model if run.recipe.model.network == "python" else None, loss)
        for run, name in zip(runs, run_names(runs), strict=True)
    ]


def _facts(
    run: RunDirectory,
    name: str,
    device: torch.device,
    model: nn.Sequential | None,
    loss: LocalLoss | None,
) -> RunFacts:
    recipe = run.recipe
    has_data = run.state(0) == "complete"
    if recipe.loss.name != "python":
        loss = build_loss(recipe.loss)

    def read() -> tuple[list[StageStatus], dict[int, StageRecord], list[StoreFacts]]:
        stages = status(run)
        numbers = range(len(stages) + 1)
        records = {n: record for n in numbers if (record := run.record(n)) is not None}
        return stages, records, _stores(run, records)

    stages, records, stores = run.read_consistently(read)
    finished = [each.stage for each in stages if each.state == "complete"]
    complete = bool(stages) and len(finished) == len(stages)
    # A whole network has no local loss in it, so any will do.
    network = assemble(run, loss or Glob(), model) if complete else None
    return RunFacts(
        name=name,
        recipe=recipe,
        stages=stages,
        records=records,
        curves=curves_so_far(run),
        departures=departures(recipe) if recipe.paper else [],
        baselines=_baselines(run, model, loss) if has_data and loss else {},
        stores=stores,
        disk=disk_use(run),
        similarity=similarity_by_stage(run, loss, model) if 1 in finished else None,
        test=classify_test_images(run, network, device) if network else None,
        commands=commands(run),
        missing=_missing(run, stages, loss),
    )


def _baselines(
    run: RunDirectory, model: nn.Sequential | None, loss: LocalLoss
) -> Mapping[str, int]:
    data = run.complete_record(0)
    stages = stages_of(run.recipe, data, model)
    return baselines(
        stages,
        shapes(stages, data.row_shape),
        loss,
        len(data.class_names),
        run.recipe.training.batch_size,
    )


def _stores(run: RunDirectory, records: Mapping[int, StageRecord]) -> list[StoreFacts]:
    return [
        StoreFacts(
            stage=number,
            name="images" if number == 0 else record.name,
            encoding=record.store.encoding,
            views=record.store.views,
            bytes=record.store.bytes,
            values=record.store.values,
            kept=run.store_path(number).is_dir(),
        )
        for number, record in records.items()
        if record.store
    ]


def _missing(run: RunDirectory, stages: Sequence[StageStatus], loss: LocalLoss | None) -> list[str]:
    found = []
    go_on = f"{command('train', '--run', run.path)} goes on with it"
    if not stages:
        found.append(f"The run has no data yet, so there is nothing to show: {go_on}.")
    unfinished: dict[State, str] = {
        "training": "in training",
        "pending": "not begun",
        "stale": "stale, since an earlier stage was trained again or settings were changed",
    }
    for state, words in unfinished.items():
        numbers = [str(each.stage) for each in stages if each.state == state]
        if numbers:
            which = (
                f"Stage {numbers[0]} is"
                if len(numbers) == 1
                else f"Stages {', '.join(numbers)} are"
            )
            found.append(f"{which} {words}.")
    if any(each.state != "complete" for each in stages):
        found.append(
            f"The network is not whole, so there is no test error of it, no confusion matrix and "
            f"no wrong image: {go_on}."
        )
    if loss is None:
        found.append(
            "The local loss was written in Python and is not known here, so memory by other means "
            "is not counted, and the similarity matrices are those of activations."
        )
    return found
