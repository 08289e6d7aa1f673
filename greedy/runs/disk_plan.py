"""Which stores a run keeps on disk, and with how many views: a pure function of numbers."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Literal

from greedy.base.errors import UserError
from greedy.base.sizes import format_size
from greedy.runs.disk_demand import DiskDemand
from greedy.runs.views import Views, is_drawn_from_images


@dataclass(frozen=True)
class StagePlan:
    """The plan for one stage's store.

    Attributes:
        views: of the store; ``live`` if there is none and the stage is replayed.
        reuse: epochs after which a view of the store is replaced, 0 for never.
        bytes: of the store, estimated.
        bytes_written: estimated, with those of views that are replaced.
        dropped_after: the stage after which the store is deleted, ``None`` if it is kept.
        finished: whether the stage is already trained.
    """

    number: int
    views: Views
    reuse: int
    bytes: int
    bytes_written: int
    dropped_after: int | None
    finished: bool


@dataclass(frozen=True)
class DiskPlan:
    """The stores that a run keeps on disk.

    Attributes:
        stages: from 1 on, without the output layer, which has no store.
        needed: the most bytes in use if each store had its wanted views and were kept.
        peak: the most bytes in use under this plan.
        budget: bytes that may be in use, ``None`` for any number.
        dropped_first: stages to be trained again whose old stores are deleted before that.
        notes: sentences about settings that the plan does not follow.
    """

    stages: tuple[StagePlan, ...]
    needed: int
    peak: int
    budget: int | None
    dropped_first: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()

    def views(self, number: int) -> Views:
        """Returns the views of a stage's store; ``live`` for the output layer."""
        return self.stages[number - 1].views if number <= len(self.stages) else "live"

    def reuse(self, number: int) -> int:
        """Returns the epochs after which a view of a stage's store is replaced, 0 for never and for
        stages without a store of views: the images and the output layer."""
        return self.stages[number - 1].reuse if 1 <= number <= len(self.stages) else 0

    def is_written_from_images(self, number: int) -> bool:
        """Returns whether a stage's store is written from the images, also where the stage trains
        from a store: where views of either are replaced, or where that has fewer views."""
        source, views = self.source(number), self.views(number)
        if views == "live" or source == 0:
            return views != "live"
        from_views = self.views(source)
        assert from_views != "live"
        return is_drawn_from_images(views, self.reuse(number), from_views, self.reuse(source))

    def source(self, number: int) -> int:
        """Returns the stage whose store a stage trains from."""
        earlier = self.stages[: number - 1]
        return max((stage.number for stage in earlier if stage.views != "live"), default=0)

    def dropped_after(self, number: int) -> list[int]:
        """Returns the stages whose stores are deleted once stage ``number`` is finished."""
        return [stage.number for stage in self.stages if stage.dropped_after == number]

    def explain(self) -> list[str]:
        """Returns the plan as sentences: one if all stores fit, else one for each stage too."""
        budget = "without a limit"
        if self.budget is not None:
            budget = f"of a budget of {format_size(self.budget)}"
        notes = [f"disk: {note}" for note in self.notes]
        lines = [
            f"stage {n}: its old store is deleted first, to make room" for n in self.dropped_first
        ]
        if self.budget is None or self.needed <= self.budget:
            total = f"disk: the stores take up to {format_size(self.peak)} {budget}"
            by_choice = [s for s in self.stages if s.views == "live" and not s.finished]
            if len(by_choice) < len(self.stages):
                lines = [*map(self._explain_stage, by_choice), *lines]
            return [*notes, total, *lines]
        lines += [
            self._explain_stage(stage)
            for stage in self.stages
            if not stage.finished or stage.dropped_after
        ]
        missing = f"all stores would take {format_size(self.needed)}"
        end = f"at most {format_size(self.peak)} {budget}"
        return [*notes, f"disk: {missing}, so:", *lines, end]

    def _explain_stage(self, stage: StagePlan) -> str:
        if stage.views == "live":
            source = self.source(stage.number)
            return f"stage {stage.number}: live, replayed from stage {source}'s store"
        end = f"deleted after stage {stage.dropped_after}" if stage.dropped_after else "kept"
        views = counted_views(stage.views, stage.reuse)
        return f"stage {stage.number}: {views}, {format_size(stage.bytes)}, {end}"


def plan_stores(
    demand: DiskDemand,
    limit: int | None,
    keep: Literal["auto", "all"] = "auto",
    room: int | None = None,
) -> DiskPlan:
    """Returns the plan that stays within a budget of ``limit`` bytes, ``None`` for any number.
    Stores that are replaced are deleted first if they do not fit beside it, within the budget and
    the ``room`` that there is now.

    A store is deleted once the next stage with a store has written it. Views are chosen for the
    least cost and then for the least sum of 1/views. In the room that is left, the stores are
    kept that save most replaying per byte. All sizes are estimates, even of finished stores, so
    that an interrupted run makes the same plan again.

    Raises:
        UserError: no plan fits, or ``keep`` is ``all`` and the stores do not fit together.
    """
    budget = math.inf if limit is None else limit
    if keep == "all":  # frozen views save time, but would make some budgets too small
        stages = (replace(stage, frozen_views=None) for stage in demand.stages)
        demand = replace(demand, stages=tuple(stages))
    wanted = _views(demand, None)
    needed = demand.peak(wanted, wanted)
    if keep == "all" and needed > budget:
        raise UserError(
            f"keeping all stores takes {format_size(needed)} and the disk budget is "
            f"{format_size(budget)}: raise store.disk_budget, lower store.views, or let "
            f"store.keep be auto"
        )
    stored = _views(demand, limit)
    kept = _worth_keeping(demand, stored, budget)
    peak = demand.peak(stored, kept)
    if peak > budget:
        raise UserError(
            f"the run takes at least {format_size(peak)} on disk and the budget is "
            f"{format_size(budget)}: raise it with --disk-budget"
        )
    most = budget if room is None else min(budget, room)
    replaced = {n: stage.replaced for n, stage in enumerate(demand.stages, 1) if stage.replaced}
    return DiskPlan(
        stages=tuple(
            StagePlan(
                number=n,
                views=stored.get(n, "live"),
                reuse=stage.reuse_of(stored[n]) if n in stored else 0,
                bytes=demand.store_bytes(n, stored[n]) if n in stored else 0,
                bytes_written=_bytes_written(demand, n, stored),
                dropped_after=None
                if n in kept or n not in stored
                else min(s for s in stored if s > n),
                finished=stage.views is not None,
            )
            for n, stage in enumerate(demand.stages[:-1], 1)
        ),
        needed=needed,
        peak=peak,
        budget=limit,
        dropped_first=tuple(replaced) if peak + sum(replaced.values()) > most else (),
    )


@dataclass(frozen=True, order=True)
class _Path:
    """A choice of stores up to some stage. The smallest is the best.

    Attributes:
        excess: bytes above the budget, where stages that are still to be trained exceed it most.
        missing: copies of a row that trainings lack, see ``DiskDemand.missing``.
        cost: multiply-adds per training row, see ``DiskDemand.cost`` and ``first_cost``.
        coarseness: sum of 1/views.
        stored: (stage, views) of every store.
    """

    excess: int = 0
    missing: int = 0
    cost: int = 0
    coarseness: Fraction = Fraction(0)
    stored: tuple[tuple[int, int], ...] = ()


def _views(demand: DiskDemand, budget: int | None) -> dict[int, int]:
    """Returns the views of each stage that has a store, within a budget unless it is ``None``. This
    is a shortest path from store to store, since only a source and the store written from it must
    be on disk at the same time."""
    paths = [_Path()]
    for number, stage in enumerate(demand.stages[:-1], start=1):
        ends = [
            min(_extend(demand, budget, path, number, views) for path in paths)
            for views in demand.choices(number)
        ]
        paths = ends if ends and stage.fixed_views else paths + ends
    last = len(demand.stages)
    return dict(min(_extend(demand, budget, path, last, None) for path in paths).stored)


def _extend(
    demand: DiskDemand, budget: int | None, path: _Path, number: int, views: int | None
) -> _Path:
    """Returns the path extended to the store of a stage, or with no ``views`` to the output
    layer."""
    stored = path.stored if views is None else (*path.stored, (number, views))
    on_disk = dict((*path.stored[-1:], *stored[len(path.stored) :]))
    source = demand.source(number, on_disk)
    steps = range(source + 1, number + 1)
    todo = [n for n in steps if n >= demand.first]
    used = [] if budget is None else [demand.on_disk(n, on_disk, ()) - budget for n in todo]
    first_views = 0 if views is None else demand.first_cost(number, on_disk)
    return _Path(
        max((path.excess, *used)),
        path.missing + sum(demand.missing(source, n, on_disk) for n in steps),
        path.cost + sum(demand.cost(source, n, on_disk) for n in steps) + first_views,
        path.coarseness + (Fraction(1, views) if views else 0),
        stored,
    )


def _worth_keeping(demand: DiskDemand, stored: Mapping[int, int], budget: float) -> set[int]:
    """Returns the stages whose stores are kept: those that save most replaying per byte, while
    there is room. The last store is always kept, since none is written after it."""

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


def _bytes_written(demand: DiskDemand, number: int, stored: Mapping[int, int]) -> int:
    """Returns the bytes written into a stage's store until the last stage that trains from it."""
    if number not in stored:
        return 0
    readers = (n for n in range(1, len(demand.stages) + 1) if demand.source(n, stored) == number)
    drawn = sum(demand.views_drawn(number, reader, stored) for reader in readers)
    written = demand.store_bytes(number, stored[number])
    return written + drawn * demand.store_bytes(number, 1, ["train"])


def counted_views(views: Views, reuse: int) -> str:
    """Returns views in words, such as ``4 views, one replaced every 5 epochs``."""
    if views == "live":
        return "live"
    kept = f", one replaced every {reuse} epochs" if reuse > 1 else ""
    if reuse == 1:
        kept = ", one replaced every epoch"
    return f"{views} view{'' if views == 1 else 's'}{kept}"
