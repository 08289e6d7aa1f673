"""The disk plan of a run, from its recipe and the files it has."""

import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from greedy.base.errors import UserError
from greedy.base.files import bytes_below
from greedy.base.sizes import parse_size
from greedy.models import StageShapes
from greedy.recipes import Recipe
from greedy.recipes.per_stage import encoding, for_stage
from greedy.runs.directory import SET_ASIDE, RunDirectory
from greedy.runs.disk_plan import (
    COMPRESSED,
    UNCOMPRESSED,
    DiskDemand,
    DiskPlan,
    StageDemand,
    Views,
    plan_stores,
)
from greedy.runs.record import StageRecord
from greedy.runs.state import RunState
from greedy.runs.unfinished import read_start

FREE_DISK_SHARE = 0.7  # of the file system's free space, for ``store.disk_budget = "auto"``


def plan_disk(
    state: RunState,
    shapes: Sequence[StageShapes],
    rows: Mapping[str, int],
    image_bytes: int,
    retrain_from: int | None = None,
) -> DiskPlan:
    """Returns the plan for all stages that are not finished, or are to be trained again.

    Args:
        state: of the run, which may have no files yet.
        shapes: of all stages.
        rows: of each split.
        image_bytes: of stage 0's store.
        retrain_from: the first stage that is trained again.

    Raises:
        UserError: the stores do not fit the budget.
    """
    run, recipe = state.run, state.run.recipe
    sizes = UNCOMPRESSED if recipe.store.compressor == "none" else COMPRESSED
    stages = []
    for number, shape in enumerate(shapes, start=1):
        again = retrain_from is not None and number >= retrain_from
        stages.append(
            StageDemand(
                values=math.prod(shape.output),
                operations=shape.operations,
                epochs=for_stage(recipe.training.epochs, number),
                views=None if again else _views(state, number),
                interrupted_views=_interrupted_views(state, number),
                replaced=bytes_below(run.store_path(number)) if again else 0,
            )
        )
    one_by_one = recipe.training.strategy == "greedy"
    demand = DiskDemand(
        tuple(stages),
        rows,
        recipe.views if one_by_one else "live",
        sizes[encoding(recipe)],
        image_bytes,
        refreshed=recipe.refresh_every > 0,
    )
    planned = plan_stores(demand, disk_budget(run), recipe.store.keep)
    return replace(planned, notes=tuple(_notes(recipe)) if one_by_one else ())


def disk_budget(run: RunDirectory) -> int:
    """Returns the bytes that a run may use. For ``auto`` the files that the run has now count as
    free, except trainings that were set aside, which are never deleted."""
    setting = run.recipe.store.disk_budget
    if setting != "auto":
        return parse_size(setting)
    path = run.path.absolute()
    existing = next(parent for parent in (path, *path.parents) if parent.exists())
    aside = sum(bytes_below(training) for training in path.glob(f"*{SET_ASIDE}*"))
    return int(FREE_DISK_SHARE * (shutil.disk_usage(existing).free + bytes_below(path) - aside))


def previous_record(state: RunState, number: int) -> StageRecord | None:
    """Returns the record of a stage's last training; ``None`` if there is none that can be
    read."""
    try:
        return state.record(number)
    except UserError:
        return None


def _views(state: RunState, number: int) -> Views | None:
    """Returns the views of a finished stage's store."""
    record = previous_record(state, number)
    if record is None:
        return None
    return record.store.views if record.store and state.has_store(number) else "live"


def _interrupted_views(state: RunState, number: int) -> Views | None:
    """Returns the views of a stage's interrupted training, ``None`` if none can resume."""
    start, parent = read_start(state.run, number), previous_record(state, number - 1)
    if start is None or parent is None:
        return None
    can_resume = (start.recipe_digest, start.parent_lineage) == (
        parent.recipe_digest,
        parent.lineage,
    )
    return start.resolved.views if can_resume else None


def _notes(recipe: Recipe) -> Iterator[str]:
    """Yields a sentence about each setting of the stores that has no effect."""
    settings = recipe.store
    reason = "nothing is drawn at random when images are read"
    if recipe.views != settings.views:
        yield f"{reason}, so a store has one view instead of {settings.views} identical ones"
    if recipe.refresh_every != settings.refresh_every:
        yield f"{reason}, so views are not drawn again"
