"""Interrupted trainings: resuming them, the stores they need, and setting aside those that cannot
resume."""

import os
import shutil
from collections.abc import Iterator
from glob import escape
from pathlib import Path

from greedy.base.commands import command
from greedy.base.errors import UserError
from greedy.cache.files import rename
from greedy.runs.checkpoint_record import StartRecord, describe_progress
from greedy.runs.directory import SET_ASIDE, RunDirectory, stage_numbers
from greedy.runs.events import Reporter
from greedy.runs.state import RunState


def find_training(directory: Path, start: StartRecord, reporter: Reporter) -> StartRecord | None:
    """Finds the interrupted training with the inputs of ``start`` and makes it
    ``directory/training``, from which it resumes. A training with other inputs that is there is
    set aside, never deleted, and reported.

    Args:
        directory: of the stage, or of the network if all stages train at once.
        start: of the training to be found or started.
        reporter: gets ``training_set_aside``.

    Returns:
        The start of the training that was found, ``None`` if there is none.

    Raises:
        UserError: the checkpoint in ``directory`` is damaged.
    """
    training = directory / "training"
    interrupted = StartRecord.read(training)
    if interrupted is not None and interrupted.has_same_inputs(start):
        return interrupted
    if interrupted is not None:
        path = next(path for path in _aside_paths(directory) if not os.path.lexists(path))
        rename(training, path)
        reporter.training_set_aside(start.stage, path, describe_progress(path))
    elif training.exists():
        shutil.rmtree(training)  # interrupted before its start was written
    for path in _trainings_aside(directory):
        if (aside := _read_start(path)) is not None and aside.has_same_inputs(start):
            directory.mkdir(parents=True, exist_ok=True)
            rename(path, training)
            return aside
    return None


def interrupted_source(state: RunState, number: int, directory: Path) -> int:
    """Returns the stage from whose store the interrupted training of stage ``number`` in
    ``directory`` reads, if that store still exists; otherwise the stage before ``number``."""
    start = StartRecord.read(directory / "training")
    if start and start.source < number and state.has_store(start.source):
        return start.source
    return number - 1


def read_start(run: RunDirectory, number: int) -> StartRecord | None:
    """Returns the start of stage ``number``'s interrupted training, ``None`` if there is none that
    can be read."""
    return _read_start(run.stage_dir(number) / "training")


def require_store_unneeded(run: RunDirectory, number: int) -> None:
    """Raises ``UserError`` if an interrupted training reads the store of stage ``number``."""
    for stage in trainings_needing(run, number):
        progress = describe_progress(run.stage_dir(stage) / "training")
        where = f" after {progress}" if progress else ""
        raise UserError(
            f"stage {stage} in {run.path}, interrupted{where}, is trained from stage {number}'s "
            f"store: resume it first, or add --force, after which "
            f"{command('cache', 'repair', run.stage_dir(number))} has to write the store again "
            f"before that training can resume"
        )


def trainings_needing(run: RunDirectory, number: int) -> list[int]:
    """Returns the stages whose interrupted trainings read the store of stage ``number``."""
    return [n for n, source in _sources(run).items() if source == number]


def stores_needed(run: RunDirectory) -> set[int]:
    """Returns the stages whose stores interrupted trainings of a run read."""
    return set(_sources(run).values())


def _sources(run: RunDirectory) -> dict[int, int]:
    """Returns the stages from whose stores those whose trainings were interrupted are trained."""
    starts = ((n, read_start(run, n)) for n in stage_numbers(run.path) if n)
    return {n: start.source for n, start in starts if start is not None}


def _trainings_aside(directory: Path) -> list[Path]:
    paths = directory.parent.glob(f"{escape(directory.name)}{SET_ASIDE}*")
    return sorted(path for path in paths if path.is_dir() and not path.is_symlink())


def _aside_paths(directory: Path) -> Iterator[Path]:
    first = directory.with_name(directory.name + SET_ASIDE)
    yield first
    number = 2
    while True:
        yield first.with_name(f"{first.name}{number}")
        number += 1


def _read_start(training: Path) -> StartRecord | None:
    try:
        return StartRecord.read(training)
    except UserError:
        return None
