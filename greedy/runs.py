"""A run directory: where things lie, and what state each stage is in."""

import os
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Literal

from greedy.cache.files import rename, write_whole
from greedy.errors import UserError
from greedy.files import canonical, digest
from greedy.manifest import StageRecord
from greedy.recipes import Recipe, differences, load, result_fields, to_toml

State = Literal["complete", "training", "pending", "stale"]
SPLITS = ("train", "test")

# What is made takes its place whole, by renaming; these two endings exist only for the moment
# of the exchange.
NEW, OLD = ".new", ".old"


class RunDirectory:
    """Stores, weights and records of one run. Make one with ``create`` or ``open``."""

    def __init__(self, path: Path, recipe: Recipe) -> None:
        self.path = path
        self.recipe = recipe

    @classmethod
    def open(cls, path: Path) -> "RunDirectory":
        """An existing run. Raises ``UserError`` where there is none."""
        if not (path / "run.toml").is_file():
            raise UserError(
                f"{path} is not a run directory (it has no run.toml): give the --run of a "
                f"`greedy train`, or begin one with --recipe"
            )
        return cls(path, load(path / "run.toml"))

    @classmethod
    def create(cls, path: Path, recipe: Recipe) -> "RunDirectory":
        """The run of this recipe at ``path``, to be trained: a new one where nothing is, or the
        one that is there if its results are the same recipe's. Raises ``UserError`` with the
        differences otherwise. A new one is on disk only after ``begin``. What a crash left half
        exchanged is put right here, and not on opening: others may read while one trains."""
        if (path / "run.toml").is_file():
            run = cls.open(path)
            run._finish_exchanges()
            if run.record(0) is not None:
                run._require_same_results(recipe)
            run.recipe = recipe
            return run
        if path.exists() and not path.is_dir():
            raise UserError(f"{path} is a file: choose another --run directory")
        if path.is_dir() and any(path.iterdir()) and not _is_own_source(path):
            raise UserError(
                f"{path} is not empty and not a run directory: choose another --run, "
                f"nothing in it has been touched"
            )
        return cls(path, recipe)

    def begin(self) -> None:
        """Writes ``run.toml``, when stage 0 is about to be: what is refused before leaves no
        trace, and settings are those of a run only once it has data."""
        self.path.mkdir(parents=True, exist_ok=True)
        write_whole(self.path / "run.toml", to_toml(self.recipe).encode())

    def _require_same_results(self, recipe: Recipe) -> None:
        if changed := differences(self.recipe, recipe):
            listed = ", ".join(f"{key} is {old!r} there, {new!r} here" for key, old, new in changed)
            raise UserError(
                f"{self.path} belongs to a run with other settings ({listed}): choose another "
                f"--run, or repeat the settings it began with"
            )

    @property
    def settings(self) -> str:
        """The digest of the recipe's fields that decide results."""
        return digest(canonical(result_fields(self.recipe)))

    def stage(self, number: int) -> Path:
        """The directory of a stage."""
        return self.path / f"stage{number}"

    def store(self, number: int) -> Path:
        """The activation store of a stage: a Zarr group with ``train`` and ``test``."""
        return self.stage(number) / "activations.zarr"

    def record(self, number: int) -> StageRecord | None:
        """What a finished stage says of itself, or ``None`` while it is not finished."""
        directory = self.stage(number)
        return StageRecord.read(directory) if (directory / "stage.json").is_file() else None

    def state(self, number: int) -> State:
        """A stage is stale when it was trained with other settings, or a stage it follows from is
        not the one it was trained from."""
        record = self.record(number)
        if record is None:
            return "training" if (self.stage(number) / "training").is_dir() else "pending"
        if record.recipe != self.settings:
            return "stale"
        parent = record.parent
        if parent is None:
            return "complete"
        source = self.record(parent.stage)
        if source is None or source.lineage != parent.lineage:
            return "stale"
        return "stale" if self.state(parent.stage) == "stale" else "complete"

    def complete(self, number: int) -> StageRecord:
        """The record of a stage that must be complete. Raises ``UserError`` if it is not."""
        record, state = self.record(number), self.state(number)
        if state == "stale":
            raise UserError(
                f"stage {number} in {self.path} is stale (an earlier stage was trained again "
                f"after it, or it is of another run): train it again with "
                f"`greedy train --run {self.path} --retrain {number}`"
            )
        if record is None:
            raise UserError(
                f"stage {number} in {self.path} is not finished: train it first, with "
                f"`greedy train --run {self.path}`"
            )
        return record

    def drop_store(self, number: int) -> None:
        """Deletes a stage's store, if it is there. The stage stays complete."""
        store = self.store(number)
        if store.is_dir():
            rename(store, _beside(store, OLD))
            _exchange(store)

    def _finish_exchanges(self) -> None:
        places = (".stage*", "stage*/.activations.zarr", "stage*/activations.zarr/.train")
        for suffix in (NEW, OLD):
            for place in places:
                for leftover in self.path.glob(place + suffix):
                    _exchange(leftover.with_name(leftover.stem.removeprefix(".")))


def new_stage(directory: Path) -> AbstractContextManager[Path]:
    """A place in which to make a stage that then becomes ``directory``, see ``replacing``."""
    return replacing(directory, directory / "training")


@contextmanager
def replacing(directory: Path, workshop: Path) -> Iterator[Path]:
    """An empty directory ``workshop`` in which to make something. On clean exit it becomes
    ``directory``, and only then does what was there before go."""
    if workshop.exists():
        shutil.rmtree(workshop)
    workshop.mkdir(parents=True)
    yield workshop
    workshop.rename(_beside(directory, NEW))
    _exchange(directory)


def _beside(directory: Path, suffix: str) -> Path:
    return directory.with_name(f".{directory.name}{suffix}")


def _exchange(directory: Path) -> None:
    """Puts something finished into its place. Can be repeated after a crash at any point."""
    new, old = _beside(directory, NEW), _beside(directory, OLD)
    if new.is_dir():
        if directory.exists():
            if old.exists():
                shutil.rmtree(old)
            directory.rename(old)
        rename(new, directory)
    if old.exists():
        shutil.rmtree(old)


def run_of_stage(path: Path) -> tuple[RunDirectory, int]:
    """The run and the number that a stage directory such as ``cache/stage2`` belongs to."""
    path = Path(os.path.normpath(path.absolute()))
    number = path.name.removeprefix("stage")
    if not path.name.startswith("stage") or not number.isdigit():
        raise UserError(f"{path} is not a stage directory: give one such as cache/stage2")
    if not path.is_dir():
        raise UserError(f"{path} does not exist: train stage {number} first")
    return RunDirectory.open(path.parent), int(number)


def _is_own_source(path: Path) -> bool:
    """Whether this is the project's own source folder ``cache/``, which may hold a run too."""
    return path.name == "cache" and (path.parent / "greedy" / "runs.py").is_file()
