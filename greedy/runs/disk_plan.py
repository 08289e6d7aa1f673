"""Which stores a run keeps on disk, and with how many views: numbers in, a plan out."""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from greedy.base.errors import UserError
from greedy.base.sizes import format_size

Views = int | Literal["live"]

# Bytes a stored value takes, at most: compressed on real activations, and as it is.
COMPRESSED = {"float32": 3.5, "float16": 1.8, "bfloat16": 1.45, "uint8": 1.05, "uint4": 0.5}
UNCOMPRESSED = {"float32": 4.0, "float16": 2.0, "bfloat16": 2.0, "uint8": 1.0, "uint4": 0.5}


@dataclass(frozen=True)
class StageDemand:
    """One stage as a plan sees it.

    Attributes:
        values: in a row of its output.
        operations: multiply-adds of its forward pass, a row.
        epochs: for which it trains.
        views: those it has, if it is finished; ``live`` if its store is gone.
        begun: those that its training began with, if it was interrupted.
        replaced: bytes of an old store that stands until the stage is trained again.
    """

    values: int
    operations: int
    epochs: int
    views: Views | None = None
    begun: Views | None = None
    replaced: int = 0

    @property
    def settled(self) -> Views | None:
        """The views that its store has or will have, if no plan can change that."""
        return self.views or self.begun


@dataclass(frozen=True)
class Demand:
    """What a run would like to store.

    Attributes:
        stages: all of them from 1 on; the last is the output layer, which has no store.
        rows: of both splits.
        wanted: views of every store.
        value_bytes: of a stored value.
        images: bytes of stage 0's store, which always stays.
        refreshed: whether the views of a source are rewritten while the next stage trains;
            the old ones stay until the new ones are whole.
    """

    stages: tuple[StageDemand, ...]
    rows: Mapping[str, int]
    wanted: Views
    value_bytes: float
    images: int
    refreshed: bool = False

    def choices(self, number: int) -> list[int]:
        """The views that a stage's store may have, most first; none where it can have no store."""
        settled = self.stages[number - 1].settled
        views = settled or self.wanted
        if views == "live":
            return []
        return [views] if settled else [views >> n for n in range(views.bit_length())]

    def store_bytes(
        self, number: int, views: int, splits: Collection[str] = ("train", "test")
    ) -> int:
        """The size of a stage's store; the test split has one view."""
        rows = sum(self.rows[split] * (views if split == "train" else 1) for split in splits)
        return math.ceil(rows * self.stages[number - 1].values * self.value_bytes)

    def source(self, number: int, stored: Mapping[int, int]) -> int:
        """The stage whose store a stage trains from, ``stored`` being views by stage."""
        return max((n for n in stored if n < number), default=0)

    def on_disk(self, number: int, stored: Mapping[int, int], kept: Collection[int]) -> int:
        """Bytes in use, at most, while a stage trains and its store is written."""
        source = self.source(number, stored)
        standing = sum(
            self.store_bytes(n, views)
            for n, views in stored.items()
            if n == source or (n < number and n in kept)
        )
        written = self.store_bytes(number, stored[number]) if number in stored else 0
        if self.refreshed and source:
            written = max(written, self.store_bytes(source, stored[source], ["train"]))
        return self.images + standing + written

    def peak(self, stored: Mapping[int, int], kept: Collection[int]) -> int:
        """Bytes in use, at most, while the stages that are not finished are trained."""
        todo = (n for n, stage in enumerate(self.stages, start=1) if stage.views is None)
        return max((self.on_disk(n, stored, kept) for n in todo), default=0)

    def replay(self, source: int, number: int) -> int:
        """Multiply-adds a row to get from a stage's store to another stage's input."""
        return sum(stage.operations for stage in self.stages[source : number - 1])


@dataclass(frozen=True)
class StagePlan:
    """What becomes of one stage's store.

    Attributes:
        views: ``live`` where there is no store and the stage is replayed.
        bytes: of the store, estimated.
        dropped_after: the stage after which the store is deleted, ``None`` if it is kept.
        finished: whether the stage is trained already.
    """

    number: int
    views: Views
    bytes: int
    dropped_after: int | None
    finished: bool


@dataclass(frozen=True)
class Plan:
    """What a run keeps on disk.

    Attributes:
        stages: from 1 on, without the output layer, which has no store.
        wanted: views of every store, if there were room.
        needed: bytes at most in use if every store were written so and kept.
        peak: bytes at most in use as it is planned.
        budget: bytes that may be in use.
        dropped_first: stages to be trained again whose old stores go before that.
        notes: sentences about what was asked for and is planned otherwise.
    """

    stages: tuple[StagePlan, ...]
    wanted: Views
    needed: int
    peak: int
    budget: int
    dropped_first: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()

    def views(self, number: int) -> Views:
        """The views of a stage's store; ``live`` for the output layer."""
        return self.stages[number - 1].views if number <= len(self.stages) else "live"

    def source(self, number: int) -> int:
        """The stage whose store a stage trains from."""
        earlier = self.stages[: number - 1]
        return max((stage.number for stage in earlier if stage.views != "live"), default=0)

    def dropped_after(self, number: int) -> list[int]:
        """The stages whose stores go once stage ``number`` is finished."""
        return [stage.number for stage in self.stages if stage.dropped_after == number]

    def explain(self) -> list[str]:
        """The plan in sentences for the user: one where nothing is missed, else one a stage."""
        budget = f"of a budget of {format_size(self.budget)}"
        notes = [f"disk: {note}" for note in self.notes]
        lines = [
            f"stage {n}: its old store is deleted first, to make room" for n in self.dropped_first
        ]
        if self.needed <= self.budget:
            whole = f"disk: the stores take up to {format_size(self.peak)} {budget}"
            return [*notes, whole, *lines]
        lines += [
            self._explained(stage)
            for stage in self.stages
            if not stage.finished or stage.dropped_after
        ]
        missing = f"all stores with {_counted(self.wanted)} would take {format_size(self.needed)}"
        end = f"at most {format_size(self.peak)} {budget}"
        return [*notes, f"disk: {missing}, so:", *lines, end]

    def _explained(self, stage: StagePlan) -> str:
        if stage.views == "live":
            source = max(
                (s.number for s in self.stages[: stage.number] if s.views != "live"), default=0
            )
            return f"stage {stage.number}: live, replayed from stage {source}'s store"
        end = f"deleted after stage {stage.dropped_after}" if stage.dropped_after else "kept"
        return f"stage {stage.number}: {_counted(stage.views)}, {format_size(stage.bytes)}, {end}"


def plan(demand: Demand, budget: int, keep: Literal["auto", "all"] = "auto") -> Plan:
    """The plan that stays within a budget of bytes.

    A store is deleted when the stage that follows it on disk has written its own. Views are
    chosen for the least replaying and then for the least sum of 1/views. Of what the budget
    then leaves room for, the stores are kept that would save most replaying a byte. Sizes are
    estimates, of finished stores too, so that a run that was interrupted plans what it would
    have done in one go. Raises ``UserError`` where nothing fits, or not all of it although
    ``keep`` is ``all``.
    """
    everything = {
        n: choices[0] for n in range(1, len(demand.stages)) if (choices := demand.choices(n))
    }
    needed = demand.peak(everything, everything)
    if keep == "all" and needed > budget:
        raise UserError(
            f"keeping all stores takes {format_size(needed)} and the disk budget is "
            f"{format_size(budget)}: raise store.disk_budget, lower store.views, or let "
            f"store.keep be auto"
        )
    stored = _views(demand, budget)
    kept = _worth_keeping(demand, stored, budget)
    peak = demand.peak(stored, kept)
    if peak > budget:
        raise UserError(
            f"the run takes at least {format_size(peak)} on disk and the budget is "
            f"{format_size(budget)}: raise it with --disk-budget"
        )
    replaced = {n: stage.replaced for n, stage in enumerate(demand.stages, 1) if stage.replaced}
    return Plan(
        stages=tuple(
            StagePlan(
                number=n,
                views=stored.get(n, "live"),
                bytes=demand.store_bytes(n, stored[n]) if n in stored else 0,
                dropped_after=None
                if n in kept or n not in stored
                else min(s for s in stored if s > n),
                finished=stage.views is not None,
            )
            for n, stage in enumerate(demand.stages[:-1], 1)
        ),
        wanted=demand.wanted,
        needed=needed,
        peak=peak,
        budget=budget,
        dropped_first=tuple(replaced) if peak + sum(replaced.values()) > budget else (),
    )


@dataclass(frozen=True, order=True)
class _Way:
    """A choice of stores up to some stage; the smaller one is the better.

    Attributes:
        excess: bytes above the budget, summed over the stages.
        replayed: multiply-adds a training row.
        coarseness: sum of 1/views.
        stored: (stage, views) of every store.
    """

    excess: int = 0
    replayed: int = 0
    coarseness: Fraction = Fraction(0)
    stored: tuple[tuple[int, int], ...] = ()


def _views(demand: Demand, budget: int) -> dict[int, int]:
    """The views of every stage that has a store: the shortest path from store to store, since
    nothing but a source and what is written from it has to be on disk at a time."""
    ways = [_Way()]
    for number, stage in enumerate(demand.stages[:-1], start=1):
        ends = [
            min(_onward(demand, budget, way, number, views) for way in ways)
            for views in demand.choices(number)
        ]
        ways = ends if ends and stage.settled else ways + ends
    return dict(min(_onward(demand, budget, way, len(demand.stages), None) for way in ways).stored)


def _onward(demand: Demand, budget: int, way: _Way, number: int, views: int | None) -> _Way:
    """A way continued to the next store, or with no views to the output layer."""
    stored = way.stored if views is None else (*way.stored, (number, views))
    here = dict((*way.stored[-1:], *stored[len(way.stored) :]))
    source = demand.source(number, here)
    steps = range(source + 1, number + 1)
    return _Way(
        way.excess + sum(max(0, demand.on_disk(n, here, ()) - budget) for n in steps),
        way.replayed + sum(demand.stages[n - 1].epochs * demand.replay(source, n) for n in steps),
        way.coarseness + (Fraction(1, views) if views else 0),
        stored,
    )


def _worth_keeping(demand: Demand, stored: Mapping[int, int], budget: int) -> set[int]:
    """The stages whose stores stay: those that save most replaying a byte, while there is room.
    The last store always stays, since nothing is written after it."""

    def saving(number: int) -> float:
        epochs = sum(
            stage.epochs
            for n, stage in enumerate(demand.stages, start=1)
            if demand.source(n, stored) == number
        )
        replayed = demand.replay(demand.source(number, stored), number + 1)
        return epochs * replayed / demand.store_bytes(number, stored[number])

    kept: set[int] = set(sorted(stored)[-1:])
    for number in sorted(stored, key=saving, reverse=True):
        if demand.peak(stored, kept | {number}) <= budget:
            kept.add(number)
    return kept


def _counted(views: Views) -> str:
    return f"{views} view{'' if views == 1 else 's'}"
