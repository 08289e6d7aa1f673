"""A live display of a run on a terminal: all its stages, and the one in training."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from greedy.base.sizes import format_size, percent, size
from greedy.base.text import shown
from greedy.cli.progress import Lines, waiting_note
from greedy.runs.choices import Choices
from greedy.runs.disk_plan import DiskPlan
from greedy.runs.events import EpochReport, RunOutline
from greedy.runs.record import StageRecord

TICKS = "▁▂▃▄▅▆▇█"
SPARKS = 16  # epochs in a sparkline
OTHER_LINES = 9  # lines of the display that are not stages


def reporter(console: Console | None = None) -> Lines:
    """Returns the reporter for one run: a live display on a terminal and in a notebook that has
    ipywidgets, else plain lines. Use it in a ``with``."""
    console = console or Console()
    redrawable = console.is_terminal and not console.is_dumb_terminal
    notebook = console.is_jupyter and find_spec("ipywidgets") is not None
    return Dashboard(console) if redrawable or notebook else Lines()


@dataclass
class _Row:
    """A stage in the table."""

    name: str
    state: str
    error: float | None = None
    memory: int | None = None
    disk: int | None = None
    seconds: float | None = None
    began: float = 0.0  # while the stage runs

    @property
    def time(self) -> float | None:
        """Seconds that the stage took, or has taken so far in this process."""
        return time.monotonic() - self.began if self.state == "running" else self.seconds


@dataclass
class _Work:
    """Progress in rows, and when it began."""

    total: int
    done: int = 0
    done_before: int = 0  # by an earlier process
    began: float = field(default_factory=time.monotonic)

    @property
    def rate(self) -> float | None:
        """Rows a second in this process."""
        rows, seconds = self.done - self.done_before, time.monotonic() - self.began
        return rows / seconds if rows and seconds else None

    @property
    def left(self) -> float | None:
        """Seconds left at this rate."""
        return (self.total - self.done) / self.rate if self.rate else None


class Dashboard(Lines):
    """Shows a run until the ``with`` ends, and is then removed; in a notebook, and after an error,
    the last state stays."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console
        self._rows: list[_Row] = []
        self._live = Live(
            self, console=console, refresh_per_second=4, transient=True, redirect_stdout=False
        )
        self._outline: RunOutline | None = None
        self._plan: DiskPlan | None = None
        self._running: range = range(0)
        self._choices: Choices | None = None
        self._reports: list[EpochReport] = []
        self._epoch = 0
        self._training: _Work | None = None
        self._writing: tuple[str, _Work] | None = None

    def __enter__(self) -> "Dashboard":
        self._live.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._live.transient = error[0] is None and not self._console.is_jupyter
        self._live.refresh()  # a notebook is not redrawn by stopping
        self._live.stop()

    def _print(self, line: str) -> None:
        self._console.print(Text(shown(line)), soft_wrap=True)

    # Events

    def run_started(self, outline: RunOutline) -> None:
        super().run_started(outline)
        self._outline = outline
        self._rows = [
            _Row(name, "waiting" if number in outline.operations else "-")
            for number, name in enumerate(outline.stages, start=1)
        ]

    def disk_planned(self, plan: DiskPlan) -> None:
        self._plan = plan
        super().disk_planned(plan)

    def stage_started(self, number: int, name: str, epochs: int, choices: Choices) -> None:
        self._begin(range(number, number + 1), self._stage_title(number, name), epochs, choices)

    def network_started(self, strategy: str, epochs: int, choices: Choices) -> None:
        numbers = range(1, len(self._rows) + 1)
        self._begin(numbers, f"{strategy}, {self._stages} stages", epochs, choices)

    def _begin(self, numbers: range, title: str, epochs: int, choices: Choices) -> None:
        self._running, self._title, self._epochs = numbers, title, epochs
        self._choices, self._reports, self._training = choices, [], None
        for number in numbers:
            row = self._rows[number - 1]
            row.state, row.memory = "running", choices.planned_peak_bytes
            row.began = time.monotonic()

    def epoch_started(self, epoch: int, rows: int) -> None:
        self._writing = None
        self._epoch = epoch
        if self._training is None:
            done = (epoch - 1) * rows
            self._training = _Work(self._epochs * rows, done, done)

    def resumed(self, rows: int) -> None:
        self.batch_finished(rows)
        self._work.done_before += rows

    def batch_finished(self, rows: int) -> None:
        self._work.done += rows

    @property
    def _work(self) -> _Work:
        work = self._writing[1] if self._writing else self._training
        assert work is not None
        return work

    def epoch_finished(self, report: EpochReport) -> None:
        self._reports.append(report)
        self._rows[self._running[-1] - 1].error = _error(report)

    def writing_started(self, number: int, split: str, rows: int) -> None:
        self._writing = (f"writing stage {number}'s {split} store", _Work(rows))

    def stage_finished(self, record: StageRecord) -> None:
        self._writing = None
        self._show_finished(record)
        self._running = range(max(self._running.start, record.stage + 1), self._running.stop)
        self._training = self._training if self._running else None

    def stage_skipped(self, record: StageRecord) -> None:
        self.skipped = True
        self._show_finished(record)

    def _show_finished(self, record: StageRecord) -> None:
        self._rows[record.stage - 1] = _Row(
            record.name,
            "done",
            record.metrics.test_error_percent,
            record.choices.planned_peak_bytes,
            record.store.bytes if record.store else None,
            record.seconds,
        )

    # Display

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if self._rows:
            yield self._table(console.height)
        if self._training is not None or self._writing is not None:
            yield self._current(options.max_width)

    def _table(self, height: int) -> Table:
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
        for name in ("stage", "name", "state"):
            table.add_column(name, no_wrap=True)
        for name in ("test err", "memory", "disk", "time"):
            table.add_column(name, justify="right", no_wrap=True, min_width=9)
        for number in self._visible_stages(max(3, height - OTHER_LINES)):
            row = self._rows[number - 1]
            table.add_row(
                str(number),
                Text(shown(row.name)),
                row.state,
                percent(row.error),
                size(row.memory),
                size(row.disk),
                _clock(row.time),
                style="bold" if row.state == "running" else None,
            )
        return table

    def _visible_stages(self, most: int) -> range:
        """Returns the numbers of at most ``most`` stages around the running one."""
        count = len(self._rows)
        first = (self._running.start if self._running else count) - most // 2
        first = max(1, min(first, count - most + 1))
        return range(first, min(first + most, count + 1))

    def _current(self, width: int) -> Table:
        work, activity = self._training, f"epoch {self._epoch}/{self._epochs}"
        if self._writing is not None:
            activity, work = self._writing
        assert work is not None
        rate = f", {work.rate:,.0f} images/s" if work.rate else ""
        lines = Table.grid()
        lines.add_row(Text(shown(f"{self._title}: {activity}{rate}, {_clock(work.left)} left")))
        lines.add_row(ProgressBar(total=work.total, completed=work.done, width=width))
        for line in (*self._epoch_lines(), self._budget_line()):
            lines.add_row(line)
        return lines

    def _epoch_lines(self) -> list[str]:
        if not self._reports:
            return []
        last = self._reports[-1]
        errors = [error for report in self._reports if (error := _error(report)) is not None]
        losses = sparkline([report.loss for report in self._reports])
        lines = [f"loss {last.loss:<9.4g} {losses}{waiting_note(last)}"]
        if errors:
            train = percent(last.train_error_percent)
            lines.append(f"error {errors[-1]:.2f} % {sparkline(errors)}  (train {train})")
        return lines

    def _budget_line(self) -> str:
        """Returns the line with memory and disk, their budgets, and the time left of the run."""
        parts = []
        outline = self._outline
        memory = self._choices.planned_peak_bytes if self._choices else None
        if outline and memory:
            parts.append(f"memory {size(memory)} of {size(outline.memory_budget)}")
        if self._plan is not None:
            image_bytes = outline.image_bytes if outline else 0
            used = image_bytes + sum(row.disk or 0 for row in self._rows)
            budget = self._plan.budget
            limit = "" if budget is None else f" of {format_size(budget)}"
            parts.append(f"disk {format_size(used)}{limit}")
        parts.append(f"run {_clock(self._run_seconds_left())} left")
        return ", ".join(parts)

    def _run_seconds_left(self) -> float | None:
        """Estimates the seconds left: the running stage at its rate, the waiting ones at the same
        operations a second."""
        if self._outline is None or self._training is None or self._training.rate is None:
            return None
        work = self._outline.operations
        running = sum(work.get(number, 0) for number in self._running) / self._training.total
        waiting = sum(
            operations
            for number, operations in work.items()
            if number not in self._running and self._rows[number - 1].state == "waiting"
        )
        left = self._training.left or 0.0
        return left + waiting / (running * self._training.rate) if running else None


def sparkline(values: Sequence[float]) -> str:
    """Draws the last ``SPARKS`` numbers as a line of bars between the least and the largest."""
    recent = values[-SPARKS:]
    low = min(recent)
    span = max(recent) - low or 1.0
    return "".join(TICKS[round((value - low) / span * (len(TICKS) - 1))] for value in recent)


def _error(report: EpochReport) -> float | None:
    """Returns the test error in percent where it was measured, else the training error."""
    tested = report.test_error_percent
    return report.train_error_percent if tested is None else tested


def _clock(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
