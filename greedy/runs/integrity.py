"""Finding damage in all files of a run."""

from pathlib import Path

from greedy.base.errors import UserError
from greedy.cache import Damage, verify
from greedy.cache.verification import unreadable
from greedy.runs.directory import SPLITS, RunDirectory, stage_numbers
from greedy.runs.file_table import FileTable
from greedy.runs.record import FILES


def verify_run(path: Path) -> list[Damage]:
    """Returns all damage in a run: in ``run.toml`` and in all finished stages."""
    try:
        run = RunDirectory.open(path)
    except UserError as error:
        return [Damage(path / "run.toml", f"cannot be read: {error}")]
    return [damage for number in stage_numbers(path) for damage in verify_stage(run, number)]


def verify_stage(run: RunDirectory, number: int) -> list[Damage]:
    """Returns all damage in one stage: in its record, in its weights and other files by their
    digests, in its store chunk by chunk. An unfinished stage and a dropped store have none. A stage
    that was exchanged meanwhile is read again."""
    while True:
        before = run.identity(number)
        damages = _damages(run, number)
        if not damages or run.identity(number) == before:
            return damages


def _damages(run: RunDirectory, number: int) -> list[Damage]:
    try:
        record = run.record(number)
    except UserError as error:
        return [Damage(run.stage_dir(number) / "stage.json", str(error))]
    except OSError as error:
        return [unreadable(run.stage_dir(number) / "stage.json", error)]
    if record is None:
        return []
    directory = run.stage_dir(number)
    damages = []
    if record.recipe_digest != run.recipe_digest:
        reason = f"does not hold the settings that stage {number} was trained with"
        damages.append(Damage(run.path / "run.toml", reason))
    for name in record.files:
        try:
            record.check_file(directory, name)
        except UserError as error:
            damages.append(Damage(directory / name, str(error)))
        except OSError as error:
            damages.append(unreadable(directory / name, error))
    if number == 0:
        try:
            FileTable.read(directory)
        except UserError as error:
            damages.append(Damage(directory / FILES, str(error)))
    if record.store and run.store_path(number).is_dir():
        for split in SPLITS:
            damages += verify(run.store_path(number) / split)
    return damages
