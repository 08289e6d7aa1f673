"""The events of a run, passed to a reporter that shows them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from greedy.runs.choices import Choices, StepMemory
from greedy.runs.disk_plan import DiskPlan
from greedy.runs.record import StageRecord

MUCH_WAITING = 10.0  # percent of an epoch, above which waiting for data is shown


@dataclass(frozen=True)
class EpochReport:
    """The figures of one epoch, a line of ``history.jsonl``.

    Errors are in percent, ``None`` without a local classifier, and on the test split also after an
    epoch in which it was not evaluated. ``seconds`` are of training only; ``waiting_percent`` of
    them training waited for rows to be read, as far as the process that ended the epoch knows.
    ``processes`` are the numbers of processes that trained it together, in order: several where it
    was resumed with another number.
    """

    epoch: int
    learning_rate: float
    loss: float
    train_error_percent: float | None
    holdout_loss: float | None
    images_per_second: float
    seconds: float
    test_error_percent: float | None = None
    waiting_percent: float | None = None
    processes: tuple[int, ...] = (1,)

    @property
    def waits(self) -> bool:
        """Whether reading, not computing, takes much of the epoch."""
        return self.waiting_percent is not None and self.waiting_percent > MUCH_WAITING


@dataclass(frozen=True)
class RunOutline:
    """The work of a run that is about to start or resume.

    Attributes:
        stages: the names of all stages of the network, in order.
        operations: multiply-adds of the forward passes of all epochs, by number of each stage that
            is to be trained.
        image_bytes: of stage 0 on disk.
        memory_budget: bytes that a step may take on the device.
    """

    stages: Sequence[str]
    operations: Mapping[int, int]
    image_bytes: int
    memory_budget: int


class Reporter:
    """Receives the events of a run and ignores them; override the methods of those you need."""

    def files_checked(self, done: int, files: int) -> None:
        """Is called often, with the number of image files checked so far: return quickly."""

    def noted(self, note: str) -> None:
        """Is called with a note about data or settings, one sentence, such as that files are
        skipped."""

    def run_started(self, outline: RunOutline) -> None:
        """Is called before stages are trained: the first event, even if no stage is left."""

    def disk_planned(self, plan: DiskPlan) -> None:
        """Is called when it is decided which stores are kept on disk."""

    def stage_started(self, number: int, name: str, epochs: int, choices: Choices) -> None:
        """Is called when the training of a stage starts or resumes."""

    def network_started(self, strategy: str, epochs: int, choices: Choices) -> None:
        """Is called when the training of all stages at once starts or resumes."""

    def training_set_aside(self, number: int, path: Path, progress: str | None) -> None:
        """Is called when an interrupted training of a stage, or with ``number`` 0 of all stages at
        once, cannot resume, since its inputs have changed, and a new one starts. The old one is
        kept at ``path``; ``progress`` is its position in words."""

    def epoch_started(self, epoch: int, rows: int) -> None:
        """Is called when an epoch over ``rows`` rows starts; epochs count from 1."""

    def batch_finished(self, rows: int) -> None:
        """Is called often, after each batch of ``rows`` rows: return quickly."""

    def resumed(self, rows: int) -> None:
        """Is called if an earlier process did ``rows`` rows of the epoch or store that has just
        started."""

    def memory_reduced(self, number: int, memory: StepMemory) -> None:
        """Is called when a step of a stage has run out of memory; from then on its steps use
        ``memory``."""

    def compiling_failed(self, number: int, reason: str) -> None:
        """Is called when a stage's step could not be compiled; it runs uncompiled."""

    def epoch_finished(self, report: EpochReport) -> None:
        """Is called after each epoch; if all stages train at once, with the report of the last
        stage."""

    def network_epoch_finished(self, reports: Sequence[EpochReport]) -> None:
        """Is called after each epoch of all stages at once, before ``epoch_finished``, with the
        report of each stage."""

    def writing_started(self, number: int, split: str, rows: int) -> None:
        """Is called before a split's store is written, ``rows`` rows over all views;
        ``batch_finished`` follows for each batch."""

    def stage_finished(self, record: StageRecord) -> None:
        """Is called when a stage is complete."""

    def stage_skipped(self, record: StageRecord) -> None:
        """Is called if a stage was already complete."""


class Reporters(Reporter):
    """Passes each event on to several reporters."""

    def __init__(self, *reporters: Reporter) -> None:
        self.reporters = reporters


def _forwarding(event: str) -> Callable[..., None]:
    def forward(self: Reporters, *arguments: Any) -> None:
        for reporter in self.reporters:
            getattr(reporter, event)(*arguments)

    return forward


for _event in (name for name in vars(Reporter) if not name.startswith("_")):
    setattr(Reporters, _event, _forwarding(_event))
