"""Writing stage 0 of a run, once it is known that the run can be trained."""

import math

import numpy as np
import torch

from greedy.base.disk_space import require_free_space, write_errors_explained
from greedy.base.errors import UserError
from greedy.build.cut_network import CutNetwork
from greedy.build.modules import build_network
from greedy.data import Augmentation, Dataset, draws_at_random, first_pass
from greedy.data.folder import FolderSplit
from greedy.runs.directory import SPLITS, RunDirectory
from greedy.runs.disk_budget import plan_disk
from greedy.runs.plan_basis import PlanBasis
from greedy.runs.record import StageRecord
from greedy.runs.state import RunState
from greedy.stores.changes import is_stage0_current
from greedy.stores.stage0 import drop_unreadable_files, stored_encoding, write_stage0
from greedy.training.planning import StagePlanner

LABEL_AND_INDEX = 16  # bytes of each row in a store


def needs_images(run: RunDirectory, *, again: bool) -> bool:
    """Returns whether a training needs the data set: to write stage 0, or to train, perhaps
    ``again``, on images that are drawn in every pass."""
    state = RunState.read(run)
    if state.stage_state(0) != "complete":
        return True
    return state.complete_record(0).data_choices.fresh and (again or not state.is_finished)


def write_images(
    planner: StagePlanner, dataset: Dataset, *, again: bool, ignore: bool
) -> StageRecord:
    """Writes stage 0, or checks that the one that is there has these data, and returns its record.

    Args:
        planner: of the run.
        dataset: the data.
        again: whether to write it again if the data have changed.
        ignore: whether to keep it if the data have changed.

    Raises:
        UserError: the data have changed, or network or data cannot be trained on.
    """
    run, recipe = planner.run, planner.recipe
    state = RunState.read(run)
    if is_stage0_current(state, dataset, again=again, ignore=ignore):
        return state.complete_record(0)
    drawn = draws_at_random(dataset)
    fresh = drawn and recipe.data.transforms == "fresh"
    shape, classes = dataset.train.shape, len(dataset.class_names or "")
    given = planner.given_network(shape)
    model = given or build_network(recipe.model, shape, classes or 2)
    network = CutNetwork.of(recipe, model, shape, classes, planner.loss)
    names = [network.name(number) for number in range(1, len(network) + 1)]
    rows = {split: len(getattr(dataset, split)) for split in SPLITS}
    row_bytes = math.prod(shape) * dataset.train.dtype.itemsize + LABEL_AND_INDEX
    needed = sum(rows.values()) * row_bytes
    require_free_space(run.path, "stage 0", needed)
    memory = planner.plan_memory(network, stored_encoding(dataset.train).name)
    disk = plan_disk(state, network.shapes, rows, needed, planner.basis, fresh=fresh)
    memory.require(range(1, len(network) + 1), disk)
    side = recipe.data.image_size
    if not isinstance(dataset.train, FolderSplit) and side and shape[1:] != (side, side):
        raise UserError(
            f"data.image_size is {side}, by which images of folder:PATH alone are resized, and the "
            f"data set's are {shape[1]}x{shape[2]}: resize them in its own transform"
        )
    dtype = torch.uint8 if dataset.train.dtype == np.uint8 else torch.float32
    Augmentation.parse(recipe.data.augmentation).require_values(torch.empty(0, dtype=dtype))
    dataset = drop_unreadable_files(recipe, dataset, planner.reporter)
    run.make_directory()
    with run.write_lock():
        state = RunState.read(run)
        if is_stage0_current(state, dataset, again=again, ignore=ignore):
            return state.complete_record(0)
        output = network.shapes[-1].output if given else None
        PlanBasis.forget(run.path)
        dataset = first_pass(dataset, recipe.seed)
        with write_errors_explained(run.path, "stage 0", needed):
            return write_stage0(run, dataset, names, output, drawn=drawn, fresh=fresh)
