"""What happens in a run, told to whoever shows it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from greedy.runs.choices import Choices, StepMemory
from greedy.runs.disk_plan import Plan
from greedy.runs.record import StageRecord


@dataclass(frozen=True)
class EpochReport:
    """One line of ``history.jsonl``. Errors in percent; ``None`` without a local classifier, and
    that of the test split also after epochs in which nobody looked at it. ``seconds`` are those of
    training alone."""

    epoch: int
    learning_rate: float
    loss: float
    train_error_percent: float | None
    holdout_loss: float | None
    images_per_second: float
    seconds: float
    test_error_percent: float | None = None


@dataclass(frozen=True)
class RunOutline:
    """What is ahead when a run begins or goes on.

    Attributes:
        stages: the names of all stages of the network, in order.
        operations: multiply-adds over all epochs of each stage that is to be trained, by number;
            of the stages' forward passes, to compare them with one another.
        images: bytes of stage 0 on disk.
        memory_budget: bytes that a step may take on the device.
    """

    stages: Sequence[str]
    operations: Mapping[int, int]
    images: int
    memory_budget: int


class Reporter:
    """Hears of a run's progress and does nothing; override what you want to know."""

    def files_checked(self, done: int, files: int) -> None:
        """Image files, so many of all, are looked at. Called often: be quick."""

    def noted(self, note: str) -> None:
        """A sentence about the data: files that are left out, or taken otherwise than might be
        thought."""

    def run_started(self, outline: RunOutline) -> None:
        """Stages are about to be trained; told before all else, even where none is left."""

    def disk_planned(self, plan: Plan) -> None:
        """What the stages to be trained will keep on disk is settled."""

    def stage_started(self, number: int, name: str, epochs: int, choices: Choices) -> None:
        """Training of a stage begins."""

    def network_started(self, strategy: str, epochs: int, choices: Choices) -> None:
        """Training of all stages at once begins."""

    def training_set_aside(self, number: int, path: Path, progress: str | None) -> None:
        """An interrupted training of a stage, or with ``number`` 0 of all stages at once, cannot
        go on, since what it follows from is not what is there now. It is kept at ``path``, as far
        as ``progress`` says; a new one begins."""

    def epoch_started(self, epoch: int, rows: int) -> None:
        """An epoch over so many rows begins, counted from 1."""

    def batch_finished(self, rows: int) -> None:
        """A step is done. Called often: be quick."""

    def resumed(self, rows: int) -> None:
        """An earlier process did so many rows of the epoch or the store that has just begun."""

    def memory_reduced(self, number: int, memory: StepMemory) -> None:
        """A step of a stage took too much memory; from it on a smaller mode is used."""

    def compiling_failed(self, number: int, reason: str) -> None:
        """A stage's step could not be compiled; it goes on without."""

    def epoch_finished(self, report: EpochReport) -> None:
        """An epoch is over; where all stages train at once, the report is the last one's."""

    def network_epoch_finished(self, reports: Sequence[EpochReport]) -> None:
        """An epoch of all stages at once is over: a report a stage, before ``epoch_finished``."""

    def writing_started(self, number: int, split: str, rows: int) -> None:
        """A split's store is being written, so many rows over all views; ``batch_finished``
        follows for each batch."""

    def stage_finished(self, record: StageRecord) -> None:
        """A stage is complete."""

    def stage_skipped(self, record: StageRecord) -> None:
        """A stage was complete already."""


class Reporters(Reporter):
    """Passes on what it hears to several."""

    def __init__(self, *reporters: Reporter) -> None:
        self.reporters = reporters


def _passing_on(event: str) -> Callable[..., None]:
    def pass_on(self: Reporters, *what: Any) -> None:
        for each in self.reporters:
            getattr(each, event)(*what)

    return pass_on


for _event in (name for name in vars(Reporter) if not name.startswith("_")):
    setattr(Reporters, _event, _passing_on(_event))
