"""Finding the source that a stage trains from, and the one its store is written from."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from greedy.base.errors import UserError
from greedy.cache import Store
from greedy.data import Augmentation
from greedy.models import Stage
from greedy.runs.directory import SPLITS, RunDirectory
from greedy.runs.disk_plan import Views
from greedy.runs.events import Reporter
from greedy.runs.network import load_stage
from greedy.runs.record import StoreRecord, channel_moments
from greedy.runs.state import RunState
from greedy.stores.refreshing import ViewRefresher
from greedy.stores.source import WRITE_ROWS, ImagePreparation, Source


@dataclass
class SourceFinder:
    """Opens the sources of a run's stages.

    Attributes:
        state: of the run, whose stage 0 is complete.
        stages: of the network; frozen ones get their weights when they are needed.
    """

    state: RunState
    stages: Sequence[Stage]
    device: torch.device
    reporter: Reporter
    _frozen: dict[int, Stage] = field(default_factory=dict, repr=False)

    @property
    def run(self) -> RunDirectory:
        """The run."""
        return self.state.run

    def for_training(self, number: int, last: int) -> Source:
        """Returns the source that stage ``number`` trains from: the last store up to that of stage
        ``last``, with its views refreshed if the recipe says so. Raises ``UserError`` if too few
        training rows are left besides those held out."""
        stored = self._last_stored(last)
        source = self._open(stored, number - 1)
        rows = self.state.complete_record(0).rows["train"]
        source.held_out = self.run.recipe.held_out(rows)
        if source.held_out and rows - source.held_out < 2:
            raise UserError(
                f"of {rows} training images {source.held_out} are held out for training.patience, "
                f"which leaves too few to train on: lower data.holdout"
            )
        if every := stored and self.run.recipe.refresh_every:
            source.refresh = ViewRefresher(
                self.run, stored, every, self._open(0, stored), self.reporter
            )
        return source

    def for_writing(self, stage: Stage, views: int, batch: int) -> Source:
        """Returns the source from which a trained stage's store is written, ``batch`` rows at a
        time. The source replays the stage itself, so its inputs are the rows of the store."""
        source = self._open(self.written_from(stage.number, views), stage.number - 1)
        source.replayed = [*source.replayed, stage]
        source.replay_rows = min(source.replay_rows, batch)
        return source

    def written_from(self, number: int, views: Views) -> int:
        """Returns the stage from whose store stage ``number``'s is written, 0 for the images.

        It is the last store before it if that has enough views and views are not refreshed:
        generations are drawn from the images. Earlier stores are never used, since the contents
        of a store must not depend on whether they were deleted.
        """
        stored = self._last_stored(number - 1)
        fewer = views != "live" and self._views(stored) < views
        return 0 if fewer or self.run.recipe.store.refresh_every else stored

    def for_repair(self, number: int, store: StoreRecord) -> Source:
        """Returns the source from which a finished stage's store is computed again: the store it
        was written from, or the images if that no longer exists."""
        stored = store.source if self._views(store.source) >= store.views else 0
        return self._open(stored, number)

    def _last_stored(self, number: int) -> int:
        """Returns the last stage up to ``number`` whose store exists."""
        return next(n for n in range(number, -1, -1) if self._views(n))

    def _views(self, number: int) -> float:
        """Returns the views of a stage's store, 0 if it does not exist. Stage 0 has any number,
        since its images are augmented on reading."""
        if number == 0:
            return math.inf
        store = self.state.complete_record(number).store
        return store.views if store and self.state.has_store(number) else 0

    def _open(self, stored: int, last: int) -> Source:
        """Returns the source with the store of stage ``stored`` that replays stages up to
        ``last``."""
        settings = self.run.recipe.data
        augmentation = Augmentation.parse(settings.augmentation, settings.cutout_length)
        moments = channel_moments(self.run.recipe, self.state.complete_record(0))
        images = ImagePreparation(*moments, augmentation)
        replayed = range(stored + 1, last + 1)
        rows = [self.state.complete_record(n).choices.write_batch for n in replayed]
        return Source(
            stored,
            self.run.store_path(stored),
            self._stores(stored),
            self.device,
            self.run.recipe.seed,
            images=images if stored == 0 else None,
            replayed=[self._load(n) for n in replayed],
            replay_rows=min(rows, default=WRITE_ROWS),
        )

    def _load(self, number: int) -> Stage:
        if number not in self._frozen:
            load_stage(self.state, self.stages[number - 1], self.device)
            self._frozen[number] = self.stages[number - 1]
        return self._frozen[number]

    def _stores(self, number: int) -> dict[str, Store]:
        """Opens both splits of a stage's store. Raises ``UserError`` if their rows are not the
        samples of stage 0's rows."""
        path = self.run.store_path(number)
        stores = {split: self.run.open_store(number, split) for split in SPLITS}
        for split, store in stores.items():
            expected = self.run.open_store(0, split).index
            if not np.array_equal(store.index, expected):
                raise UserError(
                    f"{path / split} is a store of another run (its rows are other samples): "
                    f"train stage {number} again with --retrain"
                )
        return stores
