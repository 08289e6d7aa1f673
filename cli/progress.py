"""A run's progress as plain lines, for log files."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

import click
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

from greedy.base.sizes import format_size, percent
from greedy.base.text import shown
from greedy.cli.tables import say
from greedy.runs.choices import Choices, StepMemory
from greedy.runs.disk_plan import DiskPlan
from greedy.runs.events import EpochReport, Reporter, RunOutline
from greedy.runs.record import StageRecord


class Preparing(Reporter):
    """Shows how many files of a data set have been checked, and prints notes about them."""

    def __init__(self, console: Console) -> None:
        columns = TextColumn("checking images"), BarColumn(), MofNCompleteColumn()
        self.progress = Progress(
            *columns,
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self.progress.add_task("", visible=False)

    def files_checked(self, done: int, files: int) -> None:
        self.progress.update(self._task, completed=done, total=files, visible=True)

    def noted(self, note: str) -> None:
        say(note)


@contextmanager
def preparing() -> Iterator[Preparing]:
    """Gives a reporter that shows on a terminal how many files of a data set have been checked."""
    reporter = Preparing(Console(stderr=True))
    with reporter.progress:
        yield reporter


class Lines(Reporter):
    """Prints a line for each stage, epoch and store.

    Attributes:
        skipped: whether the last stage was already complete.
    """

    def __init__(self) -> None:
        self._stages = 0
        self.skipped = False
        self._title = ""
        self._epochs = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def _print(self, line: str) -> None:
        click.echo(shown(line))

    def run_started(self, outline: RunOutline) -> None:
        self._stages = len(outline.stages)

    def _stage_title(self, number: int, name: str) -> str:
        return f"stage {number}/{self._stages} {name}"

    def noted(self, note: str) -> None:
        self._print(note)

    def disk_planned(self, plan: DiskPlan) -> None:
        for line in plan.explain():
            self._print(line)

    def training_set_aside(self, number: int, path: Path, progress: str | None) -> None:
        owner = f"stage {number}'s" if number else "the network's"
        interruption = f", interrupted after {progress}," if progress else ""
        self._print(
            f"{owner} earlier training{interruption} cannot be resumed, since what it trained from "
            f"has changed: it is kept in {path}, is resumed if that is there again, and may be "
            f"deleted"
        )

    def stage_started(self, number: int, name: str, epochs: int, choices: Choices) -> None:
        self._title, self._epochs = self._stage_title(number, name), epochs
        self._announce(choices)

    def network_started(self, strategy: str, epochs: int, choices: Choices) -> None:
        self._title, self._epochs = f"{strategy}, {self._stages} stages", epochs
        self._announce(choices)

    def _announce(self, choices: Choices) -> None:
        unit = "epoch" if self._epochs == 1 else "epochs"
        self._print(f"{self._title}: training, {self._epochs} {unit} in {choices.precision}")

    def memory_reduced(self, number: int, memory: StepMemory) -> None:
        self._print(
            f"{self._title}: out of memory, continues in mode {memory.mode} with micro-batches of "
            f"{memory.micro_batch}"
        )

    def compiling_failed(self, number: int, reason: str) -> None:
        self._print(f"{self._title}: continues without compiling, which failed: {reason}")

    def epoch_finished(self, report: EpochReport) -> None:
        self._print(
            f"{self._title}: epoch {report.epoch}/{self._epochs}, {_loss_and_error(report)}, "
            f"{report.images_per_second:,.0f} images/s{waiting_note(report)}"
        )

    def writing_started(self, number: int, split: str, rows: int) -> None:
        title = f"{self._title}: " if self._title else ""  # a repair has no title
        self._print(f"{title}writing stage {number}'s {split} store, {rows:,} rows")

    def stage_finished(self, record: StageRecord) -> None:
        self._print(self._result_line(record))

    def stage_skipped(self, record: StageRecord) -> None:
        self.skipped = True
        self._print(f"{self._stage_title(record.stage, record.name)}: complete already")

    def _result_line(self, record: StageRecord) -> str:
        metrics = record.metrics
        parts = [
            f"train error {percent(metrics.train_error_percent)}",
            f"test {percent(metrics.test_error_percent)}",
            *([format_size(record.store.bytes)] if record.store else []),
            f"{record.seconds:,.1f} s",
        ]
        return f"{self._stage_title(record.stage, record.name)}: {', '.join(parts)}"


def waiting_note(report: EpochReport) -> str:
    """Returns how long training waited for data, to be added to a line; empty if hardly at all."""
    return f", waiting for data: {report.waiting_percent:.0f} % of the time" if report.waits else ""


def _loss_and_error(report: EpochReport) -> str:
    return f"loss {report.loss:.4g}, error {percent(report.train_error_percent)}"
