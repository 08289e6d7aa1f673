"""Every automatic choice of a stage, made once when it starts and written down."""

from typing import Any

import torch

from greedy.base.devices import available_memory, pick_precision
from greedy.base.sizes import parse_size
from greedy.cache import Store
from greedy.memory.choice import Choice, memory_budget
from greedy.models import Shape
from greedy.recipes import Recipe
from greedy.recipes.per_stage import encoding, for_stage
from greedy.runs.choices import Mode
from greedy.runs.disk_plan import Views

COMPILED_STEPS = 5000  # each saves a tenth, compiling takes 10 to 40 s
KEPT_SHARE = 1 / 3  # of a step's memory, at most, is kept besides
RESIDENT_SHARE = 0.5  # of the memory that is free, for holding a store, unless told otherwise


def resolve(
    recipe: Recipe,
    store: Store,
    views: Views,
    memory: Choice,
    device: torch.device,
    *,
    compiled: bool = False,
) -> dict[str, Any]:
    """The choices for a stage that trains from ``store``: JSON values by name. Its own store
    gets as many ``views`` as the plan for the disk gives it, its step this ``memory``."""
    return {
        "precision": pick_precision(recipe.training.precision, device),
        "views": views,
        "encoding": encoding(recipe),
        "shuffle": shuffle(recipe, store.stored_bytes),
        "chunk_rows": store.chunk_rows,
        **memory.recorded(),
        "threads": torch.get_num_threads(),
        "compile": compiled,
        "deterministic": recipe.training.deterministic,
    }


def repeated(
    recipe: Recipe, before: dict[str, Any], views: Views, memory: Choice
) -> dict[str, Any]:
    """The choices that a stage was trained with ``before``, decided once: memory may be less by
    now. Anew are the views, what is asked for by name, and the memory where it was reduced on the
    way, which no training could repeat."""
    training = recipe.training
    found = before | {"views": views, "deterministic": training.deterministic}
    if training.compile != "auto":
        found["compile"] = training.compile == "on"
    reduced = found.pop("memory_reduced", False)
    if reduced or recipe.memory.budget != "auto":
        found |= memory.recorded()
    return found


def within_budget(recipe: Recipe, kept: dict[str, Any], memory: Choice) -> dict[str, Any]:
    """Choices that were made earlier, with another memory mode if theirs takes more than a budget
    that is named now. The gradients are the same but for rounding."""
    budget, planned = recipe.memory.budget, kept["planned_peak_bytes"]
    if budget == "auto" or planned is None or planned <= parse_size(budget):
        return dict(kept)
    return kept | memory.recorded()


def shuffle(recipe: Recipe, stored_bytes: int) -> str:
    """``rows`` for a store of so many bytes that is held in memory, else ``window``."""
    budget = recipe.store.ram_budget
    allowed = parse_size(budget) if budget else int(available_memory() * RESIDENT_SHARE)
    return "rows" if stored_bytes <= allowed else "window"


def compiles(
    recipe: Recipe, number: int, hidden: Shape, rows: int, memory: Choice, device: torch.device
) -> bool:
    """Whether the step of stage ``number`` is compiled, which gives a row an activation of shape
    ``hidden`` and trains on so many ``rows``. Compiling feature maps takes the time of some
    thousand steps' savings. The micro-batched modes and MPS do not compile."""
    training = recipe.training
    if training.compile == "off" or memory.mode != Mode.PLAIN or device.type == "mps":
        return False
    steps = for_stage(training.epochs, number) * rows // training.batch_size
    pays = len(hidden) == 3 and steps >= COMPILED_STEPS and not training.deterministic
    return training.compile == "on" or pays


def graphs(recipe: Recipe, resolved: dict[str, Any], device: torch.device) -> bool:
    """Whether the gradients of a plain step are launched as a CUDA graph. It keeps the memory of a
    step, also while the last batch of an epoch is computed without it."""
    planned = resolved["planned_peak_bytes"]
    if device.type != "cuda" or resolved["memory_mode"] != Mode.PLAIN or planned is None:
        return False
    return 2 * planned <= memory_budget(recipe, device)


def ample_memory(recipe: Recipe, resolved: dict[str, Any]) -> bool:
    """Whether a named budget leaves room for what a process keeps to itself of the memory that it
    frees. ``auto`` is less than what is free."""
    budget, planned = recipe.memory.budget, resolved["planned_peak_bytes"]
    if resolved["memory_mode"] != Mode.PLAIN or planned is None:
        return False
    return budget == "auto" or planned * (1 + KEPT_SHARE) <= parse_size(budget)
