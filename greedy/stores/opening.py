"""Finding the source that a stage trains from, and the one its store is written from."""

import math
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from greedy.base.commands import command
from greedy.base.errors import UserError
from greedy.base.ranks import ALONE, Ranks
from greedy.cache import Store
from greedy.data import Augmentation, Mixup, Split
from greedy.models import Stage
from greedy.recipes.per_stage import for_stage
from greedy.runs.choices import Choices
from greedy.runs.directory import SPLITS, RunDirectory
from greedy.runs.events import Reporter
from greedy.runs.network import load_stage, stage_weights
from greedy.runs.record import StageRecord, StoreRecord, channel_moments
from greedy.runs.state import RunState
from greedy.runs.views import Views, wanted_views
from greedy.stores.channels_last import Frozen, laid_out
from greedy.stores.fresh import FreshImages, require_data_set
from greedy.stores.ring import Drawing, Ring
from greedy.stores.source import WRITE_ROWS, ImagePreparation, Replayed, Source
from greedy.stores.streamed import StreamedStage


@dataclass
class SourceFinder:
    """Opens the sources of a run's stages.

    Attributes:
        state: of the run, whose stage 0 is complete.
        stages: of the network; frozen ones get their weights when they are needed.
        images: the data set's training split, for runs that read it again in every pass.
    """

    state: RunState
    stages: Sequence[Stage]
    device: torch.device
    reporter: Reporter
    images: Split | None = None
    _frozen: dict[int, Stage] = field(default_factory=dict, repr=False)

    @property
    def run(self) -> RunDirectory:
        """The run."""
        return self.state.run

    @property
    def _data(self) -> StageRecord:
        return self.state.complete_record(0)

    def for_training(
        self,
        number: int,
        stored: int,
        precision: str,
        *,
        in_memory: bool = False,
        drawing: Drawing | None = None,
        ranks: Ranks = ALONE,
    ) -> Source:
        """Returns the source that stage ``number`` trains from: the store of stage ``stored``, with
        a ring if its views are replaced, drawn as ``drawing`` says, by default as it trains. Raises
        ``UserError`` if too few training rows are left besides those held out."""
        rows = self.state.complete_record(0).rows["train"]
        held_out = self.run.recipe.held_out(rows)
        if held_out and rows - held_out < 2:
            raise UserError(
                f"of {rows} training images {held_out} are held out for training.patience, "
                f"which leaves too few to train on: lower data.holdout"
            )
        replayed = self._replayed(stored, number - 1, precision)
        ring = None
        if self.is_ring(stored):
            ring = self._ring(stored, number, drawing or Drawing(self.device))
        return self._open(
            stored, replayed, held_out=held_out, ring=ring, in_memory=in_memory, ranks=ranks
        )

    def for_writing(
        self, stage: Stage, views: int, choices: Choices, *, streamed: bool = False
    ) -> Source:
        """Returns the source from which a trained stage's store is written. The source replays the
        stage itself, after frozen ones that may be ``streamed``, so its inputs are the rows of the
        store."""
        stored = self.written_from(stage.number, views, choices.reuse)
        itself = stage, choices.write_batch, choices.channels_last
        before = stage.number - 1
        return self._open(
            stored, self._replayed(stored, before, choices.precision, streamed, [itself])
        )

    def written_from(self, number: int, views: Views, reuse: int) -> int:
        """Returns the stage from whose store stage ``number``'s is written, 0 for the images.

        It is the last store before it if that has enough views, and if neither's are replaced:
        new views are drawn from the images. Earlier stores are never used, since the contents of
        a store must not depend on whether they were deleted.
        """
        stored = self.last_stored(number - 1)
        fewer = views != "live" and self._views(stored) < views
        return 0 if fewer or reuse or self.is_ring(stored) else stored

    def for_repair(self, record: StageRecord, store: StoreRecord) -> Source:
        """Returns the source from which a finished stage's store is computed again: the store it
        was written from, or the images if that no longer exists."""
        stored = store.source if self._views(store.source) >= store.views else 0
        return self._open(stored, self._replayed(stored, record.stage, record.choices.precision))

    def last_stored(self, number: int) -> int:
        """Returns the last stage up to ``number`` whose store exists."""
        return next(n for n in range(number, -1, -1) if self._views(n))

    def _views(self, number: int) -> float:
        """Returns the views of a stage's store, 0 if it does not exist. Stage 0 has any number,
        since its images are augmented on reading."""
        if number == 0:
            return math.inf
        store = self.state.complete_record(number).store
        return store.views if store and self.state.has_store(number) else 0

    def is_ring(self, stored: int) -> bool:
        """Whether views of a stage's store are replaced while the next stage trains. Raises
        ``UserError`` if an older version replaced all of them at once."""
        if stored == 0:
            return False
        store, recipe = self.state.complete_record(stored).store, self.run.recipe
        assert store is not None
        named = recipe.store.reuse != "auto" and self._wants_ring(stored)
        if store.generation or (named and store.ring is None):
            again = command("train", "--run", self.run.path, "--retrain", stored)
            raise UserError(
                f"the views of stage {stored}'s store are of an older version, which replaced them "
                f"in another way: train it again with {again}"
            )
        return store.ring is not None

    def _wants_ring(self, stored: int) -> bool:
        fresh = self._data.data_choices.fresh
        return wanted_views(self.run.recipe, stored + 1, fresh=fresh)[1] > 0

    def require_images(self, number: int, stored: int, views: Views, written_from: int) -> None:
        """Raises ``UserError`` if the run's data set is needed and was not given: for stage
        ``number``, which trains from the store of stage ``stored``, or for its own store of
        ``views``, which is written from that of stage ``written_from``."""
        if not self._data.data_choices.fresh:
            return
        writes = views != "live" and views > 1 and number < len(self._data.network)
        if stored == 0 or self.is_ring(stored) or (written_from == 0 and writes):
            require_data_set(self.run.path, self.images)

    def _ring(self, stored: int, number: int, drawing: Drawing) -> Ring:
        """Returns the ring of a stage's store, from which stage ``number`` trains."""
        choices = self.state.complete_record(stored).choices
        finder = self
        if drawing.beside or drawing.device != self.device:
            stages = deepcopy(self.stages[:stored])
            finder = replace(self, stages=stages, device=drawing.device, _frozen={})
        replayed = finder._replayed(0, stored, choices.precision, drawing.streamed)
        return Ring(
            self.run,
            stored,
            choices.reuse,
            for_stage(self.run.recipe.training.epochs, number),
            choices.threads,
            finder._open(0, replayed),
            self.reporter,
            # A data set's own transforms may draw from generators that are those of all threads.
            beside=drawing.beside and not self._data.data_choices.fresh,
        )

    def _replayed(
        self,
        stored: int,
        last: int,
        precision: str,
        streamed: bool = False,
        more: Sequence[tuple[Frozen, int, bool]] = (),
    ) -> Replayed:
        """Returns the frozen stages after ``stored`` up to ``last``, which compute as few rows at a
        time as the store of any of them was written with. After them come ``more``, each with the
        rows that it computes at a time and whether its maps are channels-last."""
        numbers = range(stored + 1, last + 1)
        load = self._stream if streamed else self._load
        recorded = [self.state.complete_record(n).choices for n in numbers]
        chain: list[tuple[Frozen, int, bool]] = [
            (load(n), choices.write_batch, choices.channels_last)
            for n, choices in zip(numbers, recorded, strict=True)
        ]
        chain += more
        rows = min((rows for _, rows, _ in chain), default=WRITE_ROWS)
        stages = laid_out([stage for stage, _, _ in chain], [layout for _, _, layout in chain])
        return Replayed(stages, rows, precision)

    def _open(
        self,
        stored: int,
        replayed: Replayed,
        *,
        held_out: int = 0,
        ring: Ring | None = None,
        in_memory: bool = False,
        ranks: Ranks = ALONE,
    ) -> Source:
        """Returns the source with the store of stage ``stored``."""
        settings = self.run.recipe.data
        augmentation = Augmentation.parse(settings.augmentation, settings.cutout_length)
        moments = channel_moments(self.run.recipe, self._data)
        images = ImagePreparation(*moments, augmentation, self._fresh())
        mixes = settings.mixup != "none"
        mixup = Mixup(settings.mixup_alpha, settings.mixup == "manifold") if mixes else None
        return Source(
            stored,
            self.run.store_path(stored),
            self._stores(stored),
            self.device,
            self.run.recipe.seed,
            images=images if stored == 0 else None,
            replayed=replayed,
            held_out=held_out,
            ring=ring,
            in_memory=in_memory,
            mixup=mixup,
            ranks=ranks,
        )

    def _fresh(self) -> FreshImages | None:
        if not self._data.data_choices.fresh:
            return None
        return FreshImages(
            self.run.path,
            self.images,
            self.run.recipe.seed,
            self.run.recipe.data.num_workers,
            self.device.type == "cuda",
            self.reporter.noted,
        )

    def _load(self, number: int) -> Stage:
        if number not in self._frozen:
            load_stage(self.state, self.stages[number - 1], self.device)
            self._frozen[number] = self.stages[number - 1]
        return self._frozen[number]

    def _stream(self, number: int) -> StreamedStage:
        stage = self.stages[number - 1]
        return StreamedStage(stage, stage_weights(self.state, stage), self.device)

    def _stores(self, number: int) -> dict[str, Store]:
        """Opens both splits of a stage's store. Raises ``UserError`` if their rows are not the
        samples of stage 0's rows, or if it has other views than recorded."""
        stores = {split: self.run.open_store(number, split) for split in SPLITS}
        for split, store in stores.items():
            expected = self.run.open_store(0, split).index
            if not np.array_equal(store.index, expected):
                raise another_store(self.run, number, split, "its rows are other samples")
        recorded = self.state.complete_record(number).store
        if recorded and not recorded.fits(stores["train"].layout):
            raise another_store(self.run, number, "train", "it has other views")
        return stores


def another_store(run: RunDirectory, number: int, split: str, reason: str) -> UserError:
    """Returns the error for a split of a stage's store that is not the recorded one."""
    return UserError(
        f"{run.store_path(number) / split} is a store of another run ({reason}): train stage "
        f"{number} again with {command('train', '--run', run.path, '--retrain', number)}"
    )
