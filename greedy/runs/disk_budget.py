"""The disk plan of a run, from its recipe and what it has on disk so far."""

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
from greedy.runs.disk_plan import COMPRESSED, UNCOMPRESSED, Demand, Plan, StageDemand, Views, plan
from greedy.runs.record import StageRecord
from greedy.runs.unfinished import start_of

FREE_DISK_SHARE = 0.7  # of the file system's free space, for a run that says nothing else


def plan_disk(
    run: RunDirectory,
    shapes: Sequence[StageShapes],
    rows: Mapping[str, int],
    images: int,
    retrain_from: int | None = None,
) -> Plan:
    """The plan for all stages that are not finished, or are to be trained again. ``rows`` are
    those of each split, ``images`` the bytes of stage 0; the run may be yet to begin.

    Raises ``UserError`` where they do not fit.
    """
    recipe = run.recipe
    sizes = UNCOMPRESSED if recipe.store.compressor == "none" else COMPRESSED
    stages = []
    for number, shape in enumerate(shapes, start=1):
        again = retrain_from is not None and number >= retrain_from
        stages.append(
            StageDemand(
                values=math.prod(shape.output),
                operations=shape.operations,
                epochs=for_stage(recipe.training.epochs, number),
                views=None if again else _views(run, number),
                begun=_begun(run, number),
                replaced=bytes_below(run.store(number)) if again else 0,
            )
        )
    one_by_one = recipe.training.strategy == "greedy"
    demand = Demand(
        tuple(stages),
        rows,
        recipe.views if one_by_one else "live",
        sizes[encoding(recipe)],
        images,
        refreshed=recipe.refresh_every > 0,
    )
    planned = plan(demand, disk_budget(run), recipe.store.keep)
    return replace(planned, notes=tuple(_notes(recipe)) if one_by_one else ())


def disk_budget(run: RunDirectory) -> int:
    """Returns the bytes that a run may take. What the run takes now does not change ``auto``, but
    for trainings that were set aside: they stay."""
    setting = run.recipe.store.disk_budget
    if setting != "auto":
        return parse_size(setting)
    path = run.path.absolute()
    standing = next(place for place in (path, *path.parents) if place.exists())
    aside = sum(bytes_below(place) for place in path.glob(f"*{SET_ASIDE}*"))
    return int(FREE_DISK_SHARE * (shutil.disk_usage(standing).free + bytes_below(path) - aside))


def former(run: RunDirectory, number: int) -> StageRecord | None:
    """The record of a stage to be trained, perhaps again; ``None`` if it cannot be read."""
    try:
        return run.record(number)
    except UserError:
        return None


def _views(run: RunDirectory, number: int) -> Views | None:
    """The views of a finished stage's store."""
    record = former(run, number)
    if record is None:
        return None
    return record.store.views if record.store and run.store(number).is_dir() else "live"


def _begun(run: RunDirectory, number: int) -> Views | None:
    """The views that an interrupted training of a stage goes on with, if it can go on."""
    start, parent = start_of(run, number), former(run, number - 1)
    if start is None or parent is None:
        return None
    goes_on = (start.recipe, start.parent) == (parent.recipe, parent.lineage)
    return start.resolved.views if goes_on else None


def _notes(recipe: Recipe) -> Iterator[str]:
    """What the settings of the stores ask for in vain."""
    asked = recipe.store
    nothing = "nothing is drawn at random when images are read"
    if recipe.views != asked.views:
        yield f"{nothing}, so a store has one view instead of {asked.views} that would be the same"
    if recipe.refresh_every != asked.refresh_every:
        yield f"{nothing}, so views stay as they are instead of being drawn anew"
