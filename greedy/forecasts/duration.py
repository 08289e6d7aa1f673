"""Forecasts of the time that the stages of a run take on a machine that has been measured.

Included are a stage's training steps, the passes of frozen stages over rows (to replay stages
without a store, to measure the local error, for the stage's store and for new views of its source),
and writing that store and these views, as if that were not done beside the rest. Not included are
the start of each epoch, checkpoints, and writing the data set.
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
        drawing = [
            *self._frozen(self.drawing if self.apart else calibration, drawn),
            _written(calibration, self._drawn_bytes(source, epochs)),
        ]
        training = [
            (rows, step),
            *self._frozen(calibration, passed),
            _written(calibration, self._store_bytes(number)),
        ]
        if not self.apart:
            return _total(*training, *drawing)
        here, there = _total(*training), _total(*drawing)
        return None if here is None or there is None else max(here, there)

    def _frozen(
        self, calibration: Calibration | None, passed: Counter[int]
    ) -> Iterator[tuple[int, float | None]]:
        """Yields rows and the seconds that each takes in a frozen stage."""
        for stage, rows in passed.items():
            work = self.work[stage - 1]
            yield rows, calibration.frozen_seconds_a_row(work) if calibration else None

    def _store_bytes(self, number: int) -> int:
        """Returns the bytes of a stage's store as it is first written; 0 for stage 0, whose writing
        is not included, and if it has none."""
        stages = self.disk.stages
        return stages[number - 1].bytes if 1 <= number <= len(stages) else 0

    def _drawn_bytes(self, source: int, epochs: int) -> float:
        """Returns the bytes of the views of stage ``source``'s store that are drawn meanwhile."""
        if not (drawn := views_drawn(epochs, self.disk.reuse(source))):
            return 0
        in_store = self._views(source) * self.rows["train"] + self.rows["test"]
        return self._store_bytes(source) * drawn * self.rows["train"] / in_store

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


def _written(calibration: Calibration, count: float) -> tuple[float, float | None]:
    """Returns a number of bytes and the seconds that each takes to be written; ``None`` for these
    if there are some and that was not measured."""
    if not count:
        return 0, 0
    return count, 1 / calibration.write_rate if calibration.write_rate else None


def _total(*parts: tuple[float, float | None]) -> float | None:
    """Returns the seconds of all parts, given as rows or bytes and the seconds of each; ``None`` if
    those of one are not known."""
    total = 0.0
    for count, seconds in parts:
        if seconds is None:
            return None
        total += count * seconds
    return total
