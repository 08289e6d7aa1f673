"""A stage that is trained into a directory outside its run (``train-stage --to``)."""

from pathlib import Path

from greedy.base.errors import UserError
from greedy.runs.directory import require_no_links
from greedy.runs.exchange import CHECKPOINT, NEW, exchange, exchange_path
from greedy.runs.record import StageRecord


def recover_outside(directory: Path, parent: StageRecord) -> StageRecord | None:
    """Finishes the exchange of a stage that is complete but was interrupted before it was renamed
    to ``directory``.

    Args:
        directory: the stage's directory, outside its run.
        parent: the record of the stage before.

    Returns:
        The record of the stage after ``parent``, ``None`` if that is still to be trained.

    Raises:
        UserError: the directory is in a run, or holds anything but an interrupted training.
    """
    _require_outside(directory)
    if _is_half_exchanged(directory):
        exchange(directory)
        if (record := StageRecord.read(directory)).follows(parent):
            return record
        _require_outside(directory)
    return None


def _require_outside(directory: Path) -> None:
    can_resume = _is_half_exchanged(directory) or _is_unfinished(directory)
    if directory.exists() and not can_resume:
        raise UserError(f"{directory} exists already: give a --to that does not")
    for parent in directory.absolute().parents:
        if (parent / "run.toml").is_file():
            raise UserError(
                f"{directory} is inside the run directory {parent}: give a --to outside of it"
            )


def _is_half_exchanged(directory: Path) -> bool:
    """Returns whether a finished stage still has its temporary name, and its directory is empty or
    missing."""
    finished = (exchange_path(directory, NEW) / "stage.json").is_file()
    return finished and not (directory.exists() and any(directory.iterdir()))


def _is_unfinished(directory: Path) -> bool:
    """Returns whether a directory holds a stage whose training was interrupted, and nothing
    else."""
    require_no_links(directory)
    names = [path.name for path in directory.iterdir()] if directory.is_dir() else []
    return names == ["training"] and (directory / "training" / CHECKPOINT).is_dir()
