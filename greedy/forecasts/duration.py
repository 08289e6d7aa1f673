"""How long the stages of a run will take on a machine that has been measured.

Included are a stage's training steps and the passes of frozen stages over rows: where a stage
without a store is replayed, for the local error, when the stage's own store is written and when
views of its source are drawn. Not included are the start of each epoch, checkpoints, and
writing the data set.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from greedy.forecasts.calibration import Calibration, Work
from greedy.recipes import Recipe
from greedy.recipes.per_stage import for_stage
from greedy.runs.disk_plan import DiskPlan
from greedy.runs.views import views_drawn
from greedy.stores.writing import SAMPLE_ROWS


@dataclass(frozen=True)
class Durations:
    """What is planned of a run.

    Attributes:
        disk: which stages keep stores, and with how many views.
        rows: of each split.
        held_out: training rows that take no part in an epoch.
        work: of every stage's step.
    """

    recipe: Recipe
    disk: DiskPlan
    rows: Mapping[str, int]
    held_out: int
    work: Sequence[Work]

    def seconds(self, calibration: Calibration, number: int, source: int) -> float | None:
        """Estimates the seconds of stage ``number``, trained from the store of stage ``source``,
        over all its epochs. ``None`` where no stage like it, or like one that it replays, was
        measured."""
        epochs = for_stage(self.recipe.training.epochs, number)
        rows = (self.rows["train"] - self.held_out) * epochs
        parts = [(rows, calibration.seconds_a_row(self.work[number - 1]))]
        parts += [
            (passed, calibration.frozen_seconds_a_row(self.work[stage - 1]))
            for stage, passed in self.frozen_rows(number, source, epochs).items()
        ]
        total = 0.0
        for count, seconds_a_row in parts:
            if seconds_a_row is None:
                return None
            total += count * seconds_a_row
        return total

    def frozen_rows(self, number: int, source: int, epochs: int) -> Counter[int]:
        """Rows that pass through each frozen stage, by its number."""
        train, test = self.rows["train"], self.rows["test"]
        training = self.recipe.training
        passed: Counter[int] = Counter()

        def through(first: int, last: int, rows: int) -> None:
            passed.update(dict.fromkeys(range(first, last + 1), rows))

        looks = -(-epochs // training.test_every) if training.test_every else 1
        through(source + 1, number - 1, (train - self.held_out) * epochs)
        through(source + 1, number, self.held_out * epochs + test * looks)
        drawn = views_drawn(epochs, self.disk.reuse(source))
        through(1, source, drawn * train)
        if views := self._views(number):
            is_ring = any(self.disk.reuse(n) for n in (source, number))
            first = 1 if is_ring or self._views(source) < views else source + 1
            through(first, number, views * train + test + min(SAMPLE_ROWS, train))
        return passed

    def _views(self, number: int) -> int:
        """Returns the views of a stage's store, 0 if it has none, or if it is stage 0's: from there
        all stages are computed anyway."""
        stages = self.disk.stages
        views = stages[number - 1].views if 1 <= number < len(self.work) else "live"
        return 0 if views == "live" else views
