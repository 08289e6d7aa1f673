"""Trainings that were interrupted: what they still need, and those that cannot go on, set aside."""

import os
import shutil
from collections.abc import Iterator
from glob import escape
from pathlib import Path

from greedy.base.commands import command
from greedy.base.errors import UserError
from greedy.cache.files import rename
from greedy.runs.begun import Start, progress_of
from greedy.runs.directory import SET_ASIDE, RunDirectory, stage_numbers
from greedy.runs.events import Reporter


def find_training(directory: Path, start: Start, reporter: Reporter) -> Start | None:
    """Makes ``directory/training`` the training that ``start`` would begin, wherever it is kept:
    one of another start is set aside, never removed, and ``reporter`` told of it.

    Args:
        directory: of the stage, or of the network where all stages train at once.

    Returns:
        What the training there began with, ``None`` where it is yet to begin. Raises ``UserError``
        for a damaged checkpoint.
    """
    training = directory / "training"
    begun = Start.read(training)
    if begun is not None and begun.is_of(start):
        return begun
    if begun is not None:
        place = _free_place(directory)
        rename(training, place)
        reporter.training_set_aside(start.stage, place, progress_of(place))
    elif training.exists():
        shutil.rmtree(training)  # cut short before it began
    for kept in _kept(directory):
        if (found := _readable(kept)) is not None and found.is_of(start):
            directory.mkdir(parents=True, exist_ok=True)
            rename(kept, training)
            return found
    return None


def source_begun(run: RunDirectory, number: int, directory: Path) -> int:
    """Returns the stage from whose store an interrupted training of stage ``number`` in
    ``directory`` began, while that is there; otherwise the stage before."""
    begun = Start.read(directory / "training")
    there = begun is not None and begun.source < number and run.store(begun.source).is_dir()
    return begun.source if begun is not None and there else number - 1


def start_of(run: RunDirectory, number: int) -> Start | None:
    """Returns what an interrupted training of stage ``number`` began with, ``None`` where there is
    none that can be read."""
    return _readable(run.stage(number) / "training")


def require_unneeded(run: RunDirectory, number: int) -> None:
    """Raises ``UserError`` if a training that was interrupted goes on from the store of stage
    ``number``."""
    for stage in needed_by(run, number):
        progress = progress_of(run.stage(stage) / "training")
        where = f" after {progress}" if progress else ""
        raise UserError(
            f"stage {stage} in {run.path}, interrupted{where}, is trained from stage {number}'s "
            f"store: go on with it before, or add --force, after which "
            f"{command('cache', 'repair', run.stage(number))} has to write the store again before "
            f"that training can go on"
        )


def needed_by(run: RunDirectory, number: int) -> list[int]:
    """Returns the stages whose interrupted trainings go on from the store of stage ``number``."""
    starts = ((n, start_of(run, n)) for n in stage_numbers(run.path) if n)
    return [n for n, start in starts if start is not None and start.source == number]


def needed_stores(run: RunDirectory) -> list[int]:
    """Returns the stages from whose stores interrupted trainings of a run go on."""
    return [number for number in stage_numbers(run.path) if needed_by(run, number)]


def _free_place(directory: Path) -> Path:
    return next(place for place in _places(directory) if not os.path.lexists(place))


def _kept(directory: Path) -> list[Path]:
    found = directory.parent.glob(f"{escape(directory.name)}{SET_ASIDE}*")
    return sorted(path for path in found if path.is_dir() and not path.is_symlink())


def _places(directory: Path) -> Iterator[Path]:
    first = directory.with_name(directory.name + SET_ASIDE)
    yield first
    number = 2
    while True:
        yield first.with_name(f"{first.name}{number}")
        number += 1


def _readable(training: Path) -> Start | None:
    try:
        return Start.read(training)
    except UserError:
        return None
