"""A run's progress: a live bar on a terminal, plain lines elsewhere."""

from typing import Any, Self

import click
from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from greedy.cli.tables import percent
from greedy.disk import Plan
from greedy.manifest import StageRecord
from greedy.reporting import EpochReport, Reporter
from greedy.sizes import format_size
from greedy.training.modes import StepMemory


def reporter(console: Console, stages: int) -> "Lines":
    """What suits the console, for a network of so many stages. Use it in a ``with``."""
    return Bar(console, stages) if console.is_terminal else Lines(stages)


class Lines(Reporter):
    """A line for each stage, epoch and store.

    Attributes:
        skipped: whether the last stage was complete already.
    """

    def __init__(self, stages: int) -> None:
        self._stages = stages
        self.skipped = False
        self._title = ""
        self._epochs = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def _print(self, line: str) -> None:
        click.echo(line)

    def _named(self, number: int, name: str) -> str:
        return f"stage {number}/{self._stages} {name}"

    def disk_planned(self, plan: Plan) -> None:
        for line in plan.explain():
            self._print(line)

    def stage_started(self, number: int, name: str, epochs: int, resolved: dict[str, Any]) -> None:
        self._title, self._epochs = self._named(number, name), epochs
        self._announce(resolved)

    def network_started(self, strategy: str, epochs: int, resolved: dict[str, Any]) -> None:
        self._title, self._epochs = f"{strategy}, {self._stages} stages", epochs
        self._announce(resolved)

    def _announce(self, resolved: dict[str, Any]) -> None:
        unit = "epoch" if self._epochs == 1 else "epochs"
        self._print(f"{self._title}: training, {self._epochs} {unit} in {resolved['precision']}")

    def memory_reduced(self, number: int, memory: StepMemory) -> None:
        self._print(
            f"{self._title}: out of memory, goes on in mode {memory.mode} with micro-batches of "
            f"{memory.micro_batch}"
        )

    def compiling_failed(self, number: int, reason: str) -> None:
        self._print(f"{self._title}: goes on without compiling, which failed: {reason}")

    def epoch_finished(self, report: EpochReport) -> None:
        self._print(
            f"{self._title}: epoch {report.epoch}/{self._epochs}, {_measures(report)}, "
            f"{report.images_per_second:,.0f} images/s"
        )

    def writing_started(self, number: int, split: str, rows: int) -> None:
        self._print(f"{self._title}: writing stage {number}'s {split} store, {rows:,} rows")

    def stage_finished(self, record: StageRecord) -> None:
        self._print(self._finished(record))

    def stage_skipped(self, record: StageRecord) -> None:
        self.skipped = True
        self._print(f"{self._named(record.stage, record.name)}: complete already")

    def _finished(self, record: StageRecord) -> str:
        metrics = record.metrics
        parts = [
            f"train error {percent(metrics.train_error_percent)}",
            f"test {percent(metrics.test_error_percent)}",
            *([format_size(record.store.bytes)] if record.store else []),
            f"{record.seconds:,.1f} s",
        ]
        return f"{self._named(record.stage, record.name)}: {', '.join(parts)}"


class Bar(Lines):
    """A line for each finished stage, and below them the running one, live."""

    def __init__(self, console: Console, stages: int) -> None:
        super().__init__(stages)
        self._display = _Display(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[measures]}"),
            TextColumn("{task.fields[rate]}", justify="right"),
            TimeRemainingColumn(compact=True),
            console=console,
            expand=True,
        )
        self._training: TaskID | None = None
        self._writing: TaskID | None = None

    def __enter__(self) -> Self:
        self._display.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._display.stop()

    def _print(self, line: str) -> None:
        self._display.console.print(line, highlight=False, soft_wrap=True)

    def stage_started(self, number: int, name: str, epochs: int, resolved: dict[str, Any]) -> None:
        self._title, self._epochs = self._named(number, name), epochs
        self._announce(resolved)

    def _announce(self, resolved: dict[str, Any]) -> None:
        self._display.heading = self._title
        self._training = self._begin("training", None)

    def epoch_started(self, epoch: int, rows: int) -> None:
        self._stop_writing()
        assert self._training is not None
        total = self._epochs * rows
        described = f"epoch {epoch}/{self._epochs}"
        self._display.update(self._training, description=described, total=total)

    def batch_finished(self, rows: int) -> None:
        running = self._training if self._writing is None else self._writing
        assert running is not None
        self._display.advance(running, rows)
        task = next(each for each in self._display.tasks if each.id == running)
        if task.speed:
            self._display.update(running, rate=f"{task.speed:,.0f} images/s")

    def epoch_finished(self, report: EpochReport) -> None:
        assert self._training is not None
        self._display.update(self._training, measures=_measures(report))

    def writing_started(self, number: int, split: str, rows: int) -> None:
        self._stop_writing()
        self._writing = self._begin("writing", rows, f"stage {number}'s {split} store")

    def stage_finished(self, record: StageRecord) -> None:
        self._stop_writing()
        if self._training is not None:
            self._display.remove_task(self._training)
        self._training = None
        super().stage_finished(record)

    def _begin(self, description: str, total: int | None, measures: str = "") -> TaskID:
        return self._display.add_task(description, total=total, measures=measures, rate="")

    def _stop_writing(self) -> None:
        if self._writing is not None:
            self._display.remove_task(self._writing)
        self._writing = None


class _Display(Progress):
    """A progress bar below a heading."""

    heading = ""

    def get_renderables(self) -> Any:
        if self.tasks:
            heading: RenderableType = self.heading
            yield heading
        yield self.make_tasks_table(self.tasks)


def _measures(report: EpochReport) -> str:
    return f"loss {report.loss:.4g}, error {percent(report.train_error_percent)}"
