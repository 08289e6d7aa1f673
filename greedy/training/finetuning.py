"""End-to-end fine-tuning: a run that begins with the weights of another."""

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import safetensors.torch

from greedy.base.disk_space import require_free_space, write_errors_explained
from greedy.base.errors import UserError
from greedy.base.files import bytes_below, digest, file_digest, read_tensors
from greedy.cache.files import write_whole
from greedy.models import Stage
from greedy.recipes import Recipe, from_document
from greedy.runs.directory import RunDirectory, new_stage
from greedy.runs.file_table import FileTable
from greedy.runs.record import ENCODER
from greedy.runs.state import RunState
from greedy.stores.changes import require_unchanged_folder

INITIAL = "initial.safetensors"
EPOCHS = 10
RATE = 0.1  # of the rate that the stages were trained with


def begin_finetuning(
    source: RunDirectory,
    to: Path,
    overrides: Sequence[str] = (),
    *,
    ignore_changes: bool = False,
) -> RunDirectory:
    """Makes a run that trains the network of a finished run end to end, from its weights.

    The new run has the recipe of the finished one, but trains by back-propagation, and unless
    overridden for 10 epochs at a tenth of the learning rate. It gets a copy of the images and the
    weights, unless an earlier call has made it.

    Args:
        source: the finished run.
        to: the directory of the new run.
        overrides: changes of recipe fields, each as KEY=VALUE.
        ignore_changes: whether to use the stored images although their folder has changed.

    Raises:
        UserError: a stage is not finished, ``to`` holds something else, an override is not
            possible, or the folder of the images has changed.
    """
    data = RunState.read(source).complete_record(0)
    if not ignore_changes:
        require_unchanged_folder(source)

    def trained_weights() -> bytes:
        state = RunState.read(source)
        tensors = {
            f"{number}.{name}": tensor
            for number in range(1, len(data.network) + 1)
            for name, tensor in read_tensors(
                state.complete_record(number).check_file(source.stage_dir(number), ENCODER)
            ).items()
        }
        return safetensors.torch.save(tensors)

    weights = source.read_consistently(trained_weights)
    run = RunDirectory.create(to, _recipe(source.recipe, digest(weights), overrides))
    run.make_directory("--to")
    needed = len(weights) + bytes_below(source.store_path(0))
    with run.write_lock():
        if run.record(0) is None:
            require_free_space(run.path, "the images and first weights", needed)
            with write_errors_explained(run.path, "the images and first weights", needed):
                run.write_recipe()
                write_whole(run.path / INITIAL, weights)
                with new_stage(run.stage_dir(0)) as directory:
                    _copy(source.store_path(0), directory / source.store_path(0).name)
                    if files := FileTable.read(source.stage_dir(0)):
                        files.write(directory)
                    data.model_copy(update={"recipe_digest": run.recipe_digest}).write(directory)
    return run


def _copy(store: Path, to: Path) -> None:
    """Copies a store file by file, since ``shutil.copytree`` hides the error of a full disk."""
    for path in sorted(store.rglob("*")):
        place = to / path.relative_to(store)
        if path.is_file():
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, place)


def load_initial(run: RunDirectory, stages: Sequence[Stage]) -> None:
    """Loads the weights of a finished run into the stages, if the run fine-tunes one.

    Raises:
        UserError: the file of the weights is missing or damaged.
    """
    expected = run.recipe.model.initial_weights
    if expected is None:
        return
    path = run.path / INITIAL
    if not path.is_file() or file_digest(path) != expected:
        raise UserError(
            f"{path} is not the file that was written: delete {run.path} and give `greedy "
            f"finetune` again"
        )
    tensors = read_tensors(path)
    for stage in stages:
        prefix = f"{stage.number}."
        state = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        stage.load_state_dict(state, assign=True)


def _fixed_fields(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Yields section and name of the recipe fields that fine-tuning cannot change, since the images
    and the weights depend on them."""
    yield from (("data", field) for field in ("name", "image_size"))
    free = {"dropout", "initial_weights"}
    yield from (("model", field) for field in type(recipe.model).model_fields if field not in free)


def _recipe(recipe: Recipe, weights: str, overrides: Sequence[str]) -> Recipe:
    document = recipe.model_dump(exclude_none=True)
    training = document["training"]
    rate = training["learning_rate"]
    del training["milestones"], training["warmup_epochs"]
    training |= {"strategy": "backprop", "epochs": EPOCHS}
    training["learning_rate"] = RATE * (rate[0] if isinstance(rate, list) else rate)
    document["model"]["initial_weights"] = weights
    document.pop("paper", None)  # the published figure is not that of fine-tuning
    tuned = from_document(document, overrides=overrides)
    for section, field in _fixed_fields(recipe):
        if getattr(getattr(tuned, section), field) != getattr(getattr(recipe, section), field):
            raise UserError(
                f"{section}.{field} cannot be changed by fine-tuning, which uses the images and "
                f"the network of the run: leave it out"
            )
    if tuned.training.strategy == "greedy":
        raise UserError(
            "fine-tuning trains all stages at once: leave out --strategy greedy, or use `greedy "
            "train`"
        )
    return tuned
