"""Finding what a stage trains from, and what its store is written from."""

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
from greedy.runs.record import StageRecord, StoreRecord, normalisation_of
from greedy.stores.refreshing import Refresh
from greedy.stores.source import WRITE_ROWS, Images, Source


@dataclass
class Sources:
    """The stores of a run and what can be computed from them.

    Attributes:
        stages: all of the network's; frozen ones get their weights when they are needed.
        data: the record of stage 0.
    """

    run: RunDirectory
    stages: Sequence[Stage]
    data: StageRecord
    device: torch.device
    reporter: Reporter
    _frozen: dict[int, Stage] = field(default_factory=dict, repr=False)

    def for_training(self, number: int, wanted: int) -> Source:
        """What stage ``number`` trains from: the last store up to stage ``wanted``, its views
        refreshed where the recipe says so."""
        stored = self._last(wanted)
        source = self._open(stored, number - 1)
        rows = self.data.rows["train"]
        source.held_out = self.run.recipe.held_out(rows)
        if source.held_out and rows - source.held_out < 2:
            raise UserError(
                f"of {rows} training images {source.held_out} are held out for training.patience, "
                f"which leaves too few to train on: lower data.holdout"
            )
        if every := stored and self.run.recipe.refresh_every:
            source.refresh = Refresh(self.run, stored, every, self._open(0, stored), self.reporter)
        return source

    def for_writing(self, stage: Stage, views: int, batch: int) -> Source:
        """What a trained stage's store is written from, ``batch`` rows at a time: its views are
        the source's outputs."""
        source = self._open(self.written_from(stage.number, views), stage.number - 1)
        source.replayed = [*source.replayed, stage]
        source.replay_rows = min(source.replay_rows, batch)
        return source

    def written_from(self, number: int, views: Views) -> int:
        """The stage from whose store stage ``number``'s is written.

        The last store serves if it has enough views, unless views are refreshed: generations
        are drawn where the images are. Stores before the last may be deleted, so that none of
        them may decide what is written.
        """
        stored = self._last(number - 1)
        fewer = views != "live" and self._views(stored) < views
        return 0 if fewer or self.run.recipe.store.refresh_every else stored

    def of_store(self, number: int, store: StoreRecord) -> Source:
        """What the store of a finished stage is computed from again: the store it was written
        from, or if that is gone the images."""
        there = store.source if self._views(store.source) >= store.views else 0
        return self._open(there, number)

    def _last(self, number: int) -> int:
        """The last stage up to ``number`` whose store is there."""
        return next(n for n in range(number, -1, -1) if self._views(n))

    def _views(self, number: int) -> float:
        """Any number for stage 0, whose images are augmented on reading."""
        if number == 0:
            return math.inf
        store = self.run.complete(number).store
        return store.views if store and self.run.store(number).is_dir() else 0

    def _open(self, stored: int, last: int) -> Source:
        """The store of stage ``stored``, and stages up to ``last`` replayed."""
        settings = self.run.recipe.data
        augmentation = Augmentation.parse(settings.augmentation, settings.cutout_length)
        images = Images(*normalisation_of(self.run.recipe, self.data), augmentation)
        replayed = range(stored + 1, last + 1)
        rows = [self.run.complete(n).choices.write_batch for n in replayed]
        return Source(
            stored,
            self.run.store(stored),
            self._stores(stored),
            self.device,
            self.run.recipe.seed,
            images=images if stored == 0 else None,
            replayed=[self._load(n) for n in replayed],
            replay_rows=min(rows, default=WRITE_ROWS),
        )

    def _load(self, number: int) -> Stage:
        if number not in self._frozen:
            load_stage(self.run, self.stages[number - 1], self.device)
            self._frozen[number] = self.stages[number - 1]
        return self._frozen[number]

    def _stores(self, number: int) -> dict[str, Store]:
        """Both splits of a stage's store, whose rows are the samples that stage 0 says."""
        path = self.run.store(number)
        stores = {split: self.run.open_store(number, split) for split in SPLITS}
        for split, store in stores.items():
            expected = self.run.open_store(0, split).index
            if not np.array_equal(store.index, expected):
                raise UserError(
                    f"{path / split} is a store of another run (its rows are other samples): "
                    f"train stage {number} again with --retrain"
                )
        return stores
