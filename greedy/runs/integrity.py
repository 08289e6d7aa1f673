"""Looking for damage in every file of a run."""

from pathlib import Path

from greedy.base.errors import UserError
from greedy.cache import Damage, verify
from greedy.cache.verification import unreadable
from greedy.runs.directory import SPLITS, RunDirectory, stage_numbers
from greedy.runs.file_table import FileTable
from greedy.runs.record import FILES


def verify_run(path: Path) -> list[Damage]:
    """Everything wrong with a run: ``run.toml`` and all stages that are finished."""
    try:
        run = RunDirectory.open(path)
    except UserError as error:
        return [Damage(path / "run.toml", f"cannot be read: {error}")]
    return [damage for number in stage_numbers(path) for damage in verify_stage(run, number)]


def verify_stage(run: RunDirectory, number: int) -> list[Damage]:
    """Everything wrong with one stage: its record, its weights and other files by their digests,
    its store chunk by chunk. Nothing is wrong with a stage that is not finished, or with a store
    that was dropped. What was exchanged for another while it was looked at is looked at again."""
    while True:
        before = run.standing(number)
        found = _damages(run, number)
        if not found or run.standing(number) == before:
            return found


def _damages(run: RunDirectory, number: int) -> list[Damage]:
    try:
        record = run.record(number)
    except UserError as error:
        return [Damage(run.stage(number) / "stage.json", str(error))]
    except OSError as error:
        return [unreadable(run.stage(number) / "stage.json", error)]
    if record is None:
        return []
    directory = run.stage(number)
    found = []
    if record.recipe != run.settings:
        what = f"does not say the settings that stage {number} was made with"
        found.append(Damage(run.path / "run.toml", what))
    for name in record.files:
        try:
            record.check_file(directory, name)
        except UserError as error:
            found.append(Damage(directory / name, str(error)))
        except OSError as error:
            found.append(unreadable(directory / name, error))
    if number == 0:
        try:
            FileTable.read(directory)
        except UserError as error:
            found.append(Damage(directory / FILES, str(error)))
    if record.store and run.store(number).is_dir():
        for split in SPLITS:
            found += verify(run.store(number) / split)
    return found
