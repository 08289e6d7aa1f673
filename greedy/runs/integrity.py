"""Finding damage in all files of a run."""

from pathlib import Path

from greedy.base.errors import UserError
from greedy.cache import Damage, verify
from greedy.cache.verification import unreadable
from greedy.runs.checkpoint_record import checkpoint_damage
from greedy.runs.directory import SPLITS, RunDirectory, stage_numbers
from greedy.runs.exchange import finished
from greedy.runs.file_table import FileTable
from greedy.runs.plan_basis import BASIS_FILE, PlanBasis
from greedy.runs.record import ENCODER, FILES, STORE


def verify_run(path: Path) -> list[Damage]:
    """Returns all damage in a run: in ``run.toml``, ``plan.json`` and all finished stages."""
    try:
        run = RunDirectory.open(path)
    except UserError as error:
        return [Damage(path / "run.toml", f"cannot be read: {error}")]
    numbers = sorted({*stage_numbers(path), *_lost_stages(run)})
    damages = [damage for number in numbers for damage in verify_stage(run, number)]
    damages += _checkpoint_damages(run.network_dir)
    try:
        PlanBasis.kept(path)
    except FileNotFoundError:
        pass
    except (UserError, OSError) as error:
        damages.append(Damage(path / BASIS_FILE, str(error)))
    return damages


def verify_stage(run: RunDirectory, number: int) -> list[Damage]:
    """Returns all damage in one stage: in its record, in its weights and other files by their
    digests, in its store chunk by chunk, in the checkpoint of an interrupted training. A dropped
    store has none. A stage that was exchanged meanwhile is read again."""
    while True:
        before = run.identity(number)
        damages = _damages(run, number) + _checkpoint_damages(run.stage_dir(number))
        if not damages or run.identity(number) == before:
            return damages


def _lost_stages(run: RunDirectory) -> list[int]:
    """Returns the stages without a record that finished stages were trained after."""

    def read() -> list[int]:
        numbers = stage_numbers(run.path)
        finished = {n for n in numbers if (run.stage_dir(n) / "stage.json").is_file()}
        return sorted(set(range(max(finished, default=0))) - finished)

    return run.read_consistently(read)


def _damages(run: RunDirectory, number: int) -> list[Damage]:
    try:
        record = run.record(number)
    except UserError as error:
        return [Damage(run.stage_dir(number) / "stage.json", str(error))]
    except OSError as error:
        return [unreadable(run.stage_dir(number) / "stage.json", error)]
    directory = run.stage_dir(number)
    if record is None:
        left = any((directory / name).exists() for name in (ENCODER, STORE))
        lost = left or number in _lost_stages(run)
        return [Damage(directory / "stage.json", "is missing")] if lost else []
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
        except OSError as error:
            damages.append(unreadable(directory / FILES, error))
    path = run.store_path(number)
    if record.store and path.is_dir():
        damages += [damage for split in SPLITS for damage in verify(finished(path / split))]
    return damages if number or path.is_dir() else [*damages, Damage(path, "is missing")]


def _checkpoint_damages(directory: Path) -> list[Damage]:
    error = checkpoint_damage(directory / "training")
    if isinstance(error, OSError):
        return [unreadable(directory / "training", error)]
    return [Damage(directory / "training", str(error))] if error else []
