"""The disk plan of a run, from its recipe and what it has on disk so far."""

import math
import shutil
from collections.abc import Mapping, Sequence

from greedy.disk import COMPRESSED, UNCOMPRESSED, Demand, Plan, StageDemand, Views, plan
from greedy.errors import UserError
from greedy.files import bytes_below
from greedy.manifest import StageRecord
from greedy.models import StageShapes
from greedy.runs import SET_ASIDE, RunDirectory
from greedy.sizes import parse_size
from greedy.training.resolve import encoding, for_stage

AUTO_SHARE = 0.7  # of the file system's free space, for a run that says nothing else


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
                replaced=bytes_below(run.store(number)) if again else 0,
            )
        )
    one_by_one = recipe.training.strategy == "greedy"
    demand = Demand(
        tuple(stages),
        rows,
        recipe.store.views if one_by_one else "live",
        sizes[encoding(recipe)],
        images,
        refreshed=recipe.store.refresh_every > 0,
    )
    return plan(demand, disk_budget(run), recipe.store.keep)


def disk_budget(run: RunDirectory) -> int:
    """Returns the bytes that a run may take. What the run takes now does not change ``auto``, but
    for trainings that were set aside: they stay."""
    setting = run.recipe.store.disk_budget
    if setting != "auto":
        return parse_size(setting)
    path = run.path.absolute()
    standing = next(place for place in (path, *path.parents) if place.exists())
    aside = sum(bytes_below(place) for place in path.glob(f"*{SET_ASIDE}*"))
    return int(AUTO_SHARE * (shutil.disk_usage(standing).free + bytes_below(path) - aside))


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
