"""The automatic choices of a stage, made once when it starts and recorded."""

import torch

from greedy.base.devices import available_memory, pick_precision
from greedy.base.sizes import parse_size
from greedy.cache import Store
from greedy.memory.choice import Choice, memory_budget, named_budget
from greedy.models import Shape
from greedy.recipes import Recipe
from greedy.recipes.per_stage import encoding, for_stage
from greedy.runs.choices import Choices, Mode
from greedy.runs.views import Views
from greedy.steps.unfolded import unfolds

COMPILED_STEPS = 5000  # each saves a tenth, compiling takes 10 to 40 s
KEPT_SHARE = 1 / 3  # of a step's memory: the most freed memory that stays with the process
RESIDENT_SHARE = 0.5  # of the memory that is free, for holding a store, unless told otherwise


def resolve(
    recipe: Recipe,
    store: Store,
    views: Views,
    memory: Choice,
    device: torch.device,
    *,
    reuse: int = 0,
    compiled: bool = False,
    hidden: Shape = (),
    channels_last: bool = False,
    fresh: bool = False,
    processes: int = 1,
) -> Choices:
    """Decides how a stage trains from ``store``.

    Args:
        views: of the stage's own store, as the plan for the disk has it.
        reuse: epochs after which one of them is replaced, 0 for never.
        memory: of its step.
        compiled: whether its step is compiled.
        hidden: the shape of a row of its activation; none for a whole network.
        channels_last: whether it computes channels-last maps once it is frozen.
        fresh: whether its rows are read from the data set instead.
        processes: the number of processes on this machine, each of which holds a store.
    """
    precision = pick_precision(recipe.training.precision, device)
    return Choices.model_validate(
        {
            "precision": precision,
            "views": views,
            **_if_ring(reuse),
            "encoding": encoding(recipe),
            "shuffle": "rows" if fresh else shuffle(recipe, processes * store.stored_bytes),
            "chunk_rows": store.chunk_rows,
            **memory.recorded(),
            "threads": torch.get_num_threads(),
            "compile": compiled,
            **({"unfold": True} if unfolds(hidden, precision, device.type) else {}),
            **({"channels_last": True} if channels_last else {}),
            "deterministic": recipe.training.deterministic,
        }
    )


def resolve_again(
    recipe: Recipe, before: Choices, views: Views, reuse: int, memory: Choice
) -> Choices:
    """Returns the choices of a stage's last training for its next one. Decided again are the views,
    what the recipe names, and the memory where steps had to be reduced, which no training could
    repeat."""
    training = recipe.training
    choices = before.model_dump(exclude={"memory_reduced", "reuse"})
    choices |= {"views": views, "deterministic": training.deterministic} | _if_ring(reuse)
    if training.compile != "auto":
        choices["compile"] = training.compile == "on"
    if before.memory_reduced or recipe.memory.budget != "auto":
        choices |= memory.recorded()
    return Choices.model_validate(choices)


def _if_ring(reuse: int) -> dict[str, int]:
    return {"reuse": reuse} if reuse else {}


def within_budget(recipe: Recipe, choices: Choices, memory: Choice) -> Choices:
    """Returns the choices of an unfinished training, with another memory mode if its own takes more
    than the budget that the recipe names now. Gradients then differ by rounding alone."""
    budget, planned = named_budget(recipe), choices.planned_peak_bytes
    if budget is None or planned is None or planned <= budget:
        return choices
    return choices.model_copy(update=memory.recorded())


def shuffle(recipe: Recipe, stored_bytes: int) -> str:
    """Returns ``rows`` for a store of ``stored_bytes`` that is held in memory, else ``window``."""
    budget = recipe.store.ram_budget
    allowed = parse_size(budget) if budget else int(available_memory() * RESIDENT_SHARE)
    return "rows" if stored_bytes <= allowed else "window"


def compiles(
    recipe: Recipe, number: int, hidden: Shape, rows: int, memory: Choice, device: torch.device
) -> bool:
    """Returns whether the step of a stage is compiled. Compiling takes the time that some thousand
    steps save, and pays for feature maps only. The micro-batched modes and MPS do not compile.

    Args:
        number: the number of the stage.
        hidden: the shape of a row of its activation.
        rows: the number of training rows.
        memory: the memory mode of its step.
    """
    training = recipe.training
    if training.compile == "off" or memory.mode != Mode.PLAIN or device.type == "mps":
        return False
    steps = for_stage(training.epochs, number) * rows // training.batch_size
    pays = len(hidden) == 3 and steps >= COMPILED_STEPS and not training.deterministic
    return training.compile == "on" or pays


def graphs(recipe: Recipe, choices: Choices, device: torch.device) -> bool:
    """Returns whether the gradients of a plain step are launched as a CUDA graph: if the memory
    budget has room for two steps, since a graph keeps its memory while the last batch of an epoch
    is computed without it."""
    planned = choices.planned_peak_bytes
    if device.type != "cuda" or choices.memory.mode is not Mode.PLAIN or planned is None:
        return False
    return 2 * planned <= memory_budget(recipe, device)


def ample_memory(recipe: Recipe, choices: Choices) -> bool:
    """Returns whether the memory budget leaves room for freed memory that stays with the process:
    always if it is ``auto``."""
    budget, planned = named_budget(recipe), choices.planned_peak_bytes
    if choices.memory.mode is not Mode.PLAIN or planned is None:
        return False
    return budget is None or planned * (1 + KEPT_SHARE) <= budget
