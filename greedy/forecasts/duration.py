"""Forecasts of the time that the stages of a run take on a machine that has been measured.

Included are a stage's training steps and the passes of frozen stages over rows: to replay stages
without a store, to measure the local error, to write the stage's store and to draw views of its
source. Not included are the start of each epoch, checkpoints, and writing the data set.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from greedy.recipes import Recipe
from greedy.recipes.per_stage import for_stage
from greedy.runs.disk_plan import DiskPlan
from greedy.runs.views import views_drawn
from greedy.stores.writing import SAMPLE_ROWS
from greedy.training.calibration import Calibration, Work


@dataclass(frozen=True)
class Durations:
    """Forecasts the times of a run's stages.

    Attributes:
        recipe: the run's recipe.
        disk: the plan of which stages keep stores, and with how many views.
        rows: number of rows of each split.
        held_out: number of training rows that are held out.
        work: the work of every stage's step.
        apart: whether another device draws views meanwhile.
        drawing: how fast that is; ``None`` if it was not measured.
    """

    recipe: Recipe
    disk: DiskPlan
    rows: Mapping[str, int]
    held_out: int
    work: Sequence[Work]
    apart: bool = False
    drawing: Calibration | None = None

    def seconds(self, calibration: Calibration, number: int, source: int) -> float | None:
        """Estimates the seconds of stage ``number``, trained from the store of stage ``source``,
        over all its epochs. Returns ``None`` if no stage like it, or like one that is replayed, was
        measured."""
        epochs = for_stage(self.recipe.training.epochs, number)
        rows = (self.rows["train"] - self.held_out) * epochs
        step = calibration.seconds_a_row(self.work[number - 1])
        passed, drawn = self.frozen_rows(number, source, epochs), self.drawn_rows(source, epochs)
        if not self.apart:
            return _total((rows, step), *self._frozen(calibration, passed + drawn))
        training = _total((rows, step), *self._frozen(calibration, passed))
        drawing = _total(*self._frozen(self.drawing, drawn))
        return None if training is None or drawing is None else max(training, drawing)

    def _frozen(
        self, calibration: Calibration | None, passed: Counter[int]
    ) -> Iterator[tuple[int, float | None]]:
        """Yields rows and the seconds that each takes in a frozen stage."""
        for stage, rows in passed.items():
            work = self.work[stage - 1]
            yield rows, calibration.frozen_seconds_a_row(work) if calibration else None

    def drawn_rows(self, source: int, epochs: int) -> Counter[int]:
        """Counts the rows that pass through each frozen stage while views of stage ``source``'s
        store are drawn. Returns them by the number of the frozen stage."""
        rows = views_drawn(epochs, self.disk.reuse(source)) * self.rows["train"]
        return Counter(dict.fromkeys(range(1, source + 1), rows) if rows else {})

    def frozen_rows(self, number: int, source: int, epochs: int) -> Counter[int]:
        """Counts the other rows that pass through each frozen stage while a stage trains and its
        store is written. Returns them by the number of the frozen stage."""
        train, test = self.rows["train"], self.rows["test"]
        training = self.recipe.training
        passed: Counter[int] = Counter()

        def through(first: int, last: int, rows: int) -> None:
            passed.update(dict.fromkeys(range(first, last + 1), rows))

        tests = -(-epochs // training.test_every) if training.test_every else 1
        through(source + 1, number - 1, (train - self.held_out) * epochs)
        through(source + 1, number, self.held_out * epochs + test * tests)
        if views := self._views(number):
            first = 1 if self.disk.is_written_from_images(number) else source + 1
            through(first, number, views * train + test + min(SAMPLE_ROWS, train))
        return passed

    def _views(self, number: int) -> int:
        """Returns the number of views in a stage's store; 0 if it has none, and for stage 0, from
        which all stages are computed."""
        stages = self.disk.stages
        views = stages[number - 1].views if 1 <= number < len(self.work) else "live"
        return 0 if views == "live" else views


def _total(*parts: tuple[int, float | None]) -> float | None:
    """Returns the seconds of all parts, given as rows and the seconds of each; ``None`` if those of
    one are not known."""
    total = 0.0
    for rows, seconds in parts:
        if seconds is None:
            return None
        total += rows * seconds
    return total
