"""What happens in a run, told to whoever shows it."""

from dataclasses import dataclass
from typing import Any

from greedy.disk import Plan
from greedy.manifest import StageRecord
from greedy.training.modes import StepMemory


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


class Reporter:
    """Hears of a run's progress and does nothing; override what you want to know."""

    def disk_planned(self, plan: Plan) -> None:
        """What the stages to be trained will keep on disk is settled."""

    def stage_started(self, number: int, name: str, epochs: int, resolved: dict[str, Any]) -> None:
        """Training of a stage begins."""

    def network_started(self, strategy: str, epochs: int, resolved: dict[str, Any]) -> None:
        """Training of all stages at once begins."""

    def epoch_started(self, epoch: int, rows: int) -> None:
        """An epoch over so many rows begins, counted from 1."""

    def batch_finished(self, rows: int) -> None:
        """A step is done. Called often: be quick."""

    def memory_reduced(self, number: int, memory: StepMemory) -> None:
        """A step of a stage took too much memory; from it on a smaller mode is used."""

    def compiling_failed(self, number: int, reason: str) -> None:
        """A stage's step could not be compiled; it goes on without."""

    def epoch_finished(self, report: EpochReport) -> None:
        """An epoch is over; where all stages train at once, the report is the last one's."""

    def writing_started(self, number: int, split: str, rows: int) -> None:
        """A split's store is being written, so many rows over all views; ``batch_finished``
        follows for each batch."""

    def stage_finished(self, record: StageRecord) -> None:
        """A stage is complete."""

    def stage_skipped(self, record: StageRecord) -> None:
        """A stage was complete already."""
