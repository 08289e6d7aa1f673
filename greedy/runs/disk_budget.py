"""The disk plan of a run, from its recipe and the files it has."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from greedy.base.errors import UserError
from greedy.base.sizes import parse_size
from greedy.models import StageShapes
from greedy.recipes import Recipe
from greedy.recipes.per_stage import encoding, for_stage
from greedy.runs.checkpoint_record import StartRecord
from greedy.runs.disk_demand import (
    COMPRESSED,
    UNCOMPRESSED,
    DiskDemand,
    StageDemand,
)
from greedy.runs.disk_plan import DiskPlan, plan_stores
from greedy.runs.plan_basis import FREE_DISK_SHARE, FULL_DISK_SHARE, PlanBasis, disk_room
from greedy.runs.record import StageRecord
from greedy.runs.state import RunState
from greedy.runs.unfinished import read_start
from greedy.runs.views import Views, enough_views, wanted_views


def plan_disk(
    state: RunState,
    shapes: Sequence[StageShapes],
    rows: Mapping[str, int],
    image_bytes: int,
    basis: PlanBasis,
    retrain_from: int | None = None,
    *,
    fresh: bool = False,
) -> DiskPlan:
    """Returns the plan for all stages that are not finished, or are to be trained again.

    Args:
        state: of the run, which may have no files yet.
        shapes: of all stages.
        rows: of each split.
        image_bytes: of stage 0's store.
        basis: the budget, if it is ``auto``; and what a byte of a store takes, which decides
            whether a stage needs one where views are ``auto``.
        retrain_from: the first stage that is trained again.
        fresh: whether images are read from the data set for every view and live epoch.

    Raises:
        UserError: the stores do not fit the budget.
    """
    run, recipe = state.run, state.run.recipe
    sizes = UNCOMPRESSED if recipe.store.compressor == "none" else COMPRESSED
    by_speed = recipe.store.views == "auto" and not fresh  # reading a data set may take any time
    numbers = range(1, len(shapes) + 1)
    demand = DiskDemand(
        tuple(
            _stage_demand(state, n, shapes, retrain_from, by_speed=by_speed, fresh=fresh)
            for n in numbers
        ),
        rows,
        sizes[encoding(recipe)],
        0 if recipe.store.stores else image_bytes,
        basis.byte_operations if by_speed else None,
    )
    one_by_one = recipe.training.strategy == "greedy"
    notes = list(_notes(recipe)) if one_by_one and not fresh else []
    named = recipe.store.disk_budget
    if named != "auto":
        planned = plan_stores(demand, parse_size(named), recipe.store.keep)
    elif (room := disk_room(run)) is None:
        planned = plan_stores(demand, None, recipe.store.keep)
    else:
        planned = plan_stores(demand, basis.budget, recipe.store.keep, room)
        if planned.peak > FULL_DISK_SHARE * room:
            anew = int(FREE_DISK_SHARE * room)
            planned = plan_stores(demand, anew, recipe.store.keep, room)
            less = "there is less room than when the run began"
            notes.append(f"{less}, so its stores are planned anew")
    return replace(planned, notes=tuple(notes))


def _stage_demand(
    state: RunState,
    number: int,
    shapes: Sequence[StageShapes],
    retrain_from: int | None,
    *,
    by_speed: bool,
    fresh: bool,
) -> StageDemand:
    recipe, shape = state.run.recipe, shapes[number - 1]
    again = retrain_from is not None and number >= retrain_from
    record, start = previous_record(state, number), _resumable_start(state, number)
    next_stage = min(number + 1, len(shapes))
    epochs, next_epochs = (for_stage(recipe.training.epochs, n) for n in (number, next_stage))
    views, reuse = wanted_views(recipe, next_stage, fresh=fresh)
    drawn = recipe.data.is_augmented or fresh
    by_rule = isinstance(views, int) and drawn and recipe.store.reuse == "auto"
    lowered_by = next_epochs if by_rule else None
    copies = enough_views(epochs, reuse=0)[0] if by_rule and by_speed else 0
    frozen = enough_views(next_epochs, reuse=0)[0] if copies and reuse else None
    if start is not None:
        reuse, lowered_by, frozen = start.resolved.reuse, None, None
    if record is not None and not again:
        reuse, lowered_by, frozen = record.choices.reuse, None, None
    return StageDemand(
        values=math.prod(shape.output),
        operations=shape.operations,
        epochs=epochs,
        copies=copies,
        wanted_views=views if recipe.training.strategy == "greedy" else "live",
        reuse=reuse,
        next_epochs=lowered_by,
        frozen_views=frozen,
        views=_views(state, record) if record is not None and not again else None,
        interrupted_views=start.resolved.views if start is not None else None,
        replaced=state.run.store_bytes(number) if again else 0,
    )


def previous_record(state: RunState, number: int) -> StageRecord | None:
    """Returns the record of a stage's last training; ``None`` if there is none that can be
    read."""
    try:
        return state.record(number)
    except UserError:
        return None


def _views(state: RunState, record: StageRecord) -> Views:
    """Returns the views of a finished stage's store."""
    return record.store.views if record.store and state.has_store(record.stage) else "live"


def _resumable_start(state: RunState, number: int) -> StartRecord | None:
    """Returns the start of a stage's interrupted training, ``None`` if none can resume."""
    start, parent = read_start(state.run, number), previous_record(state, number - 1)
    if start is None or parent is None:
        return None
    can_resume = (start.recipe_digest, start.parent_lineage) == (
        parent.recipe_digest,
        parent.lineage,
    )
    return start if can_resume else None


def _notes(recipe: Recipe) -> Iterator[str]:
    """Yields a sentence about each setting of the stores that has no effect."""
    settings = recipe.store
    if recipe.data.is_augmented:
        return
    reason = "nothing is drawn at random when images are read"
    if isinstance(settings.views, int) and settings.views > 1:
        yield f"{reason}, so a store has one view instead of {settings.views} identical ones"
    if settings.reuse not in (0, "auto"):
        yield f"{reason}, so views are not replaced"
