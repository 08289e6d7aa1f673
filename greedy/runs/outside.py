"""A stage trained into a directory of its own, outside of its run."""

from pathlib import Path

from greedy.base.errors import UserError
from greedy.runs.directory import require_own_files
from greedy.runs.exchange import CHECKPOINT, NEW, beside, exchange
from greedy.runs.record import StageRecord


def finished_outside(directory: Path, parent: StageRecord) -> StageRecord | None:
    """Returns the record of the stage after ``parent`` if it was finished and only its way to
    ``directory`` cut short, which it is put into; ``None`` where it is to be trained.

    Raises ``UserError`` for a directory that lies in a run, or that holds anything but what a
    training left that was cut short.
    """
    _require_outside(directory)
    if _is_half_exchanged(directory):
        exchange(directory)
        if (record := StageRecord.read(directory)).follows(parent):
            return record
        _require_outside(directory)
    return None


def _require_outside(directory: Path) -> None:
    begun = _is_half_exchanged(directory) or _is_unfinished(directory)
    if directory.exists() and not begun:
        raise UserError(f"{directory} exists already: give a --to that does not")
    for parent in directory.absolute().parents:
        if (parent / "run.toml").is_file():
            raise UserError(
                f"{directory} would stand for another stage, or in another run: give a --to "
                f"outside of {parent}"
            )


def _is_half_exchanged(directory: Path) -> bool:
    """Whether a finished stage is beside its directory, which is empty or not there."""
    finished = (beside(directory, NEW) / "stage.json").is_file()
    return finished and not (directory.exists() and any(directory.iterdir()))


def _is_unfinished(directory: Path) -> bool:
    """Whether a directory holds a stage whose training was interrupted, and nothing else."""
    require_own_files(directory)
    inside = [path.name for path in directory.iterdir()] if directory.is_dir() else []
    return inside == ["training"] and (directory / "training" / CHECKPOINT).is_dir()
