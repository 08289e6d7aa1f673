"""What a run asks of a disk: sizes of its stores, and what they cost in operations."""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from greedy.runs.views import Views, enough_views, is_drawn_from_images, views_drawn

# Bytes of a stored value, at most: compressed, measured on real activations, and uncompressed.
COMPRESSED = {"float32": 3.5, "float16": 1.8, "bfloat16": 1.45, "uint8": 1.05, "uint4": 0.5}
UNCOMPRESSED = {"float32": 4.0, "float16": 2.0, "bfloat16": 2.0, "uint8": 1.0, "uint4": 0.5}


class ByteOperations(NamedTuple):
    """Multiply-adds of frozen stages that take as long as a byte of a store.

    Attributes:
        read: to read and decode it.
        written: to encode and write it.
    """

    read: float
    written: float


@dataclass(frozen=True)
class StageDemand:
    """The numbers of one stage that a plan depends on.

    Attributes:
        values: in a row of its output.
        operations: multiply-adds per row of its forward pass.
        epochs: for which it trains.
        wanted_views: of its store, if there is room.
        reuse: epochs after which a view of its store is replaced, 0 for never.
        next_epochs: of the stage after it, by which fewer views than wanted are replaced when the
            rule says so; ``None`` where they are as all are.
        frozen_views: all that a ring would draw, more than are wanted. Its store may have them,
            and none is replaced, where that saves time; ``None`` if it may not.
        copies: of a row that its training takes; 0 for any number.
        views: of its store if it is finished; ``live`` if that was deleted.
        interrupted_views: the views chosen for its training if that was interrupted.
        replaced: bytes of an old store that is kept until the stage is trained again.
    """

    values: int
    operations: int
    epochs: int
    wanted_views: Views = "live"
    reuse: int = 0
    next_epochs: int | None = None
    frozen_views: int | None = None
    copies: int = 0
    views: Views | None = None
    interrupted_views: Views | None = None
    replaced: int = 0

    def reuse_of(self, views: int) -> int:
        """Returns the epochs after which one of ``views`` views of its store is replaced."""
        if views == self.frozen_views:
            return 0
        if self.next_epochs is None or views == self.wanted_views:
            return self.reuse
        return enough_views(self.next_epochs, views)[1]

    @property
    def fixed_views(self) -> Views | None:
        """The views of its store if they are decided already, else ``None``."""
        return self.views or self.interrupted_views


@dataclass(frozen=True)
class DiskDemand:
    """The numbers of a run that a plan depends on.

    Attributes:
        stages: all stages from 1 on; the last is the output layer, which has no store.
        rows: of each split.
        value_bytes: of a stored value.
        image_bytes: of stage 0's store, which is always kept.
        byte_operations: if stages whose outputs are computed faster than they are written and read
            need no store; ``None`` if all stages have one.
    """

    stages: tuple[StageDemand, ...]
    rows: Mapping[str, int]
    value_bytes: float
    image_bytes: int
    byte_operations: ByteOperations | None = None

    def choices(self, number: int) -> list[int]:
        """Returns the views that a stage's store may have, most first; empty if it has no store."""
        stage = self.stages[number - 1]
        views = stage.fixed_views or stage.wanted_views
        if views == "live":
            return []
        if stage.fixed_views:
            return [views]
        lowered = [views >> n for n in range(views.bit_length())]
        frozen = stage.frozen_views
        if frozen and self.store_bytes(number, frozen) <= self._largest_wanted:
            return [frozen, *lowered]
        return lowered

    @cached_property
    def first(self) -> int:
        """The number of the first stage that is not finished, 0 if all are."""
        return next((n for n, stage in enumerate(self.stages, start=1) if stage.views is None), 0)

    @cached_property
    def _largest_wanted(self) -> int:
        """The bytes of the largest store that a stage would have with its wanted views."""
        wanted = ((n, stage.wanted_views) for n, stage in enumerate(self.stages[:-1], start=1))
        return max(self.store_bytes(n, views) for n, views in wanted if views != "live")

    def store_bytes(
        self, number: int, views: int, splits: Collection[str] = ("train", "test")
    ) -> int:
        """Returns the bytes of a stage's store; the test split has one view."""
        rows = sum(self.rows[split] * (views if split == "train" else 1) for split in splits)
        return math.ceil(rows * self.stages[number - 1].values * self.value_bytes)

    def source(self, number: int, stored: Mapping[int, int]) -> int:
        """Returns the stage whose store a stage trains from; ``stored`` has the views of each
        store by stage."""
        return max((n for n in stored if n < number), default=0)

    def on_disk(self, number: int, stored: Mapping[int, int], kept: Collection[int]) -> int:
        """Returns the most bytes in use while a stage trains and its store is written."""
        source = self.source(number, stored)
        existing = sum(
            self.store_bytes(n, views)
            for n, views in stored.items()
            if n == source or (n < number and n in kept)
        )
        written = self.store_bytes(number, stored[number]) if number in stored else 0
        if self.views_drawn(source, number, stored):
            # The old view is kept until the new one is complete.
            written = max(written, self.store_bytes(source, 1, ["train"]))
        return self.image_bytes + existing + written

    def peak(self, stored: Mapping[int, int], kept: Collection[int]) -> int:
        """Returns the most bytes in use while the unfinished stages are trained."""
        todo = (n for n, stage in enumerate(self.stages, start=1) if stage.views is None)
        return max((self.on_disk(n, stored, kept) for n in todo), default=0)

    def replay(self, source: int, number: int) -> int:
        """Returns the multiply-adds per row from stage ``source``'s store to stage ``number``'s
        input."""
        return sum(stage.operations for stage in self.stages[source : number - 1])

    def views_drawn(self, source: int, number: int, stored: Mapping[int, int]) -> int:
        """Returns the views of stage ``source``'s store that are drawn while stage ``number``
        trains from it; ``stored`` has the views of each store by stage."""
        reuse = self.stages[source - 1].reuse_of(stored[source]) if source else 0
        return views_drawn(self.stages[number - 1].epochs, reuse)

    def missing(self, source: int, number: int, stored: Mapping[int, int]) -> int:
        """Returns the copies of a row that stage ``number`` lacks if it trains from the store of
        stage ``source``: that was made for the stage after it, which may train for less long."""
        if not source:
            return 0
        seen = stored[source] + self.views_drawn(source, number, stored)
        return max(0, self.stages[number - 1].copies - seen)

    def cost(self, source: int, number: int, stored: Mapping[int, int]) -> int:
        """Returns the multiply-adds per row that stage ``number``'s inputs take in all epochs if it
        trains from the store of stage ``source``: replaying and, if that counts, reading and
        drawing views."""
        epochs = self.stages[number - 1].epochs
        replayed = epochs * self.replay(source, number)
        if self.byte_operations is None or not source:
            return replayed
        read = epochs * self._row_bytes(source) * self.byte_operations.read
        drawn = self.views_drawn(source, number, stored)
        return replayed + math.ceil(read) + drawn * self._view_cost(0, source)

    def first_cost(self, number: int, stored: Mapping[int, int]) -> int:
        """Returns the multiply-adds per row of the views that a stage's store begins with, if that
        counts. It is the same for fewer views than are wanted, so that none are saved on."""
        if self.byte_operations is None:
            return 0
        stage, source = self.stages[number - 1], self.source(number, stored)
        views = stage.fixed_views or stage.wanted_views
        if stored[number] == stage.frozen_views:
            views = stage.frozen_views
        assert views != "live"
        if source and not is_drawn_from_images(
            views,
            stage.reuse_of(stored[number]),
            stored[source],
            self.stages[source - 1].reuse_of(stored[source]),
        ):
            return views * self._view_cost(source, number)
        return views * self._view_cost(0, number)

    def _view_cost(self, source: int, number: int) -> int:
        """Returns the multiply-adds per row of computing and writing a view of a stage's store."""
        assert self.byte_operations is not None
        written = self._row_bytes(number) * self.byte_operations.written
        return self.replay(source, number + 1) + math.ceil(written)

    def _row_bytes(self, number: int) -> float:
        return self.value_bytes * self.stages[number - 1].values
