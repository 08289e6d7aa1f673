"""Looking for damage in every file of a run."""

from pathlib import Path

from greedy.cache import Damage, verify
from greedy.errors import UserError
from greedy.manifest import StageRecord
from greedy.runs import SPLITS, RunDirectory, stage_numbers


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
        before = _standing(run, number)
        found = _damages(run, number)
        if not found or _standing(run, number) == before:
            return found


def _standing(run: RunDirectory, number: int) -> list[tuple[int, int] | None]:
    """By what it shows that a stage, its store or its views were exchanged."""
    store = run.store(number)
    found: list[tuple[int, int] | None] = []
    for path in (run.stage(number) / "stage.json", store, store / "train"):
        try:
            status = path.stat()
            found.append((status.st_ino, status.st_mtime_ns))
        except OSError:
            found.append(None)
    return found


def _damages(run: RunDirectory, number: int) -> list[Damage]:
    directory = run.stage(number)
    if not (directory / "stage.json").is_file():
        return []
    try:
        record = StageRecord.read(directory)
    except (UserError, OSError) as error:
        return [Damage(directory / "stage.json", str(error))]
    found = []
    if record.recipe != run.settings:
        what = f"does not say the settings that stage {number} was made with"
        found.append(Damage(run.path / "run.toml", what))
    for name in record.files:
        try:
            record.check_file(directory, name)
        except UserError as error:
            found.append(Damage(directory / name, str(error)))
    if record.store and run.store(number).is_dir():
        for split in SPLITS:
            found += verify(run.store(number) / split)
    return found
