"""A run directory: where things lie, and what state each stage is in."""

import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Literal, TypeVar

from greedy.base.commands import command
from greedy.base.errors import TrainingError, UserError, no_stage
from greedy.base.files import canonical_json, digest
from greedy.base.locking import HOLDER, LOCK, RunLock
from greedy.cache import Store
from greedy.cache.files import part_of, rename, write_whole
from greedy.recipes import Recipe, differences, load, result_fields, to_toml
from greedy.runs.exchange import NEW, OLD, beside, exchange, identities, replacing, undisturbed
from greedy.runs.record import HISTORY, StageRecord
from greedy.runs.retraining import NOTE

Found = TypeVar("Found")
State = Literal["complete", "training", "pending", "stale"]
SPLITS = ("train", "test")

_STAGE = r"stage(0|[1-9][0-9]{0,8})"
# Ends the name of a training that cannot go on and is kept, beside where it was; a number follows
# where there are several.
SET_ASIDE = ".unfinished"


class RunDirectory:
    """Stores, weights and records of one run. Make one with ``create`` or ``open``."""

    def __init__(self, path: Path, recipe: Recipe) -> None:
        self.path = path
        self.recipe = recipe
        self._lock = RunLock(path)

    @classmethod
    def open(cls, path: Path) -> "RunDirectory":
        """An existing run. Raises ``UserError`` where there is none."""
        if not (path / "run.toml").is_file():
            raise UserError(
                f"{path} is not a run directory (it has no run.toml): give the --run of a "
                f"`greedy train`, or begin one with --recipe"
            )
        own = ("network*", "stage*", ".stage*")
        require_own_files(path / "run.toml", *(each for name in own for each in path.glob(name)))
        return cls(path, load(path / "run.toml", inherits=False))

    @classmethod
    def create(cls, path: Path, recipe: Recipe) -> "RunDirectory":
        """The run of this recipe at ``path``, to be trained: a new one where nothing is, or the
        one that is there if its results are the same recipe's. Raises ``UserError`` with the
        differences otherwise. A new one is on disk only after ``begin``."""
        if (path / "run.toml").is_file():
            run = cls.open(path)
            if run.record(0) is not None:
                run._require_same_results(recipe)
            run.recipe = recipe
            return run
        if path.exists() and not path.is_dir():
            raise UserError(f"{path} is a file: choose another --run directory")
        if path.is_dir() and not (_is_unbegun(path) or _is_own_source(path)):
            raise UserError(
                f"{path} is not empty and not a run directory: choose another --run, "
                f"nothing in it has been touched"
            )
        return cls(path, recipe)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Inside, no other process writes into the run. What a crash left half exchanged is put
        right first, and not on opening: others may read while one trains."""
        with self._lock.held() as first:
            if first and (self.path / "run.toml").is_file():
                there = RunDirectory.open(self.path)
                there._finish_exchanges()
                if there.record(0) is not None:
                    there._require_same_results(self.recipe)
            yield

    def make(self, option: str = "--run") -> None:
        """Makes the directory where there is none. Raises ``TrainingError`` if it cannot be."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            place = self.path.absolute()
            standing = next(each for each in place.parents if os.path.lexists(each))
            raise TrainingError(
                f"the run directory {self.path} cannot be made in {standing} ({error.strerror}): "
                f"choose another place with {option}"
            ) from error

    def begin(self) -> None:
        """Writes ``run.toml``, when stage 0 is about to be: what is refused before leaves no
        trace, and settings are those of a run only once it has data."""
        write_whole(self.path / "run.toml", to_toml(self.recipe).encode())

    def _require_same_results(self, recipe: Recipe) -> None:
        if changed := differences(self.recipe, recipe):
            named = [f"{key} is {old!r} there, {new!r} here" for key, old, new in changed[:3]]
            more = [f"and {len(changed) - 3} more"] if len(changed) > 3 else []
            listed = ", ".join(named + more)
            raise UserError(
                f"{self.path} belongs to a run with other settings ({listed}): choose another "
                f"--run, or repeat the settings it began with"
            )

    @property
    def settings(self) -> str:
        """The digest of the recipe's fields that decide results."""
        return digest(canonical_json(result_fields(self.recipe)))

    def stage(self, number: int) -> Path:
        """Returns the directory of a stage. While a finished one takes its place, or where that was
        cut short, it is the one beside."""
        place = self.path / f"stage{number}"
        new = beside(place, NEW)
        standing = (path for path in (place, new) if (path / "stage.json").is_file())
        return next(standing, place)

    def undisturbed(self, read: Callable[[], Found], number: int | None = None) -> Found:
        """Returns what ``read`` reads of the run, or of one stage: the old or the new, never a
        mixture of the two. It is read again if stages, stores or views were exchanged meanwhile."""
        return undisturbed(lambda: self._places(number), read)

    def standing(self, number: int) -> object:
        """Returns what changes when a stage, its store or its views are exchanged."""
        return identities(self._places(number))

    def _places(self, number: int | None) -> list[Path]:
        numbers = stage_numbers(self.path) if number is None else [number]
        return [place for n in numbers for place in (self.stage(n), self.store(n))]

    @property
    def network(self) -> Path:
        """The directory where all stages are in the making while they train at once."""
        return self.path / "network"

    def finish_network(self) -> None:
        """Deletes what stages were made in that trained at once and are all in their places by now.
        It is renamed first: half of it would look like a training to go on with."""
        old = beside(self.network, OLD)
        rename(self.network, old)
        shutil.rmtree(old)

    def training_history(self, number: int) -> Path:
        """The epochs so far of a stage in training, a line each."""
        if self.network.is_dir():
            return self.network / "training" / f"stage{number}.jsonl"
        return self.stage(number) / "training" / HISTORY

    def store(self, number: int) -> Path:
        """The activation store of a stage: a Zarr group with ``train`` and ``test``."""
        return self.stage(number) / "activations.zarr"

    def open_store(self, number: int, split: str) -> Store:
        """Opens a split of a stage's store, whose damage is told with what to do about it."""
        if number:
            way = command("cache", "repair", self.stage(number))
            advice = f"{way} writes it as it was, then the same command goes on"
        else:
            advice = "images cannot be computed again: begin another run from the data"
        return Store(self.store(number) / split, advice)

    def record(self, number: int) -> StageRecord | None:
        """What a finished stage says of itself, or ``None`` while it is not finished."""
        for _ in range(3):  # a stage that is being exchanged is at one of its two places
            directory = self.stage(number)
            try:
                record = StageRecord.read(directory)
                break
            except (FileNotFoundError, NotADirectoryError):
                pass
        else:
            return None
        if record.stage != number:
            raise UserError(
                f"{directory} holds stage {record.stage}: put it into its place, or delete it and "
                f"go on with `greedy train`"
            )
        return record

    def state(self, number: int) -> State:
        """A stage is stale when it was trained with other settings, or a stage it follows from is
        not the one it was trained from."""
        record = self.record(number)
        if record is None:
            begun = self.network.is_dir() or (self.stage(number) / "training").is_dir()
            return "training" if number and begun else "pending"
        if record.recipe != self.settings:
            return "stale"
        parent = record.parent
        if parent is None:
            return "complete"
        source = self.record(parent.stage)
        if source is None or source.lineage != parent.lineage:
            return "stale"
        return "stale" if self.state(parent.stage) == "stale" else "complete"

    def is_stale(self, number: int) -> bool:
        """Whether a stage is there and ``state`` says that it is stale."""
        return self.state(number) == "stale"

    def complete(self, number: int) -> StageRecord:
        """The record of a stage that must be complete. Raises ``UserError`` if it is not."""
        record, state = self.record(number), self.state(number)
        if state == "stale":
            which = [number] if self.recipe.training.strategy == "greedy" else []
            raise UserError(
                f"stage {number} in {self.path} is stale (an earlier stage was trained again "
                f"after it, or it is of another run): train it again with "
                f"{command('train', '--run', self.path, '--retrain', *which)}"
            )
        if record is None:
            raise UserError(
                f"stage {number} in {self.path} is not finished: train it first, with "
                f"{command('train', '--run', self.path)}"
            )
        return record

    @property
    def is_finished(self) -> bool:
        """Whether every stage has a record, and none is still to be trained again."""
        data = self.record(0)
        if data is None or self.network.exists() or (self.path / NOTE).exists():
            return False
        return all(self.record(n) is not None for n in range(1, len(data.network) + 1))

    def require_stage(self, number: int) -> None:
        """Raises ``UserError`` for a number that is not of a stage that trains."""
        count = len(self.complete(0).network)
        if not 1 <= number <= count:
            raise no_stage(number, count)

    def drop_stores(self, *numbers: int) -> None:
        """Deletes the stores of stages, where they are there. The stages stay complete. Whether an
        interrupted training needs one, ``greedy.runs.unfinished`` knows."""
        for store in map(self.store, numbers):
            if store.is_dir():
                rename(store, beside(store, OLD))
                exchange(store)

    def _finish_exchanges(self) -> None:
        if (old := beside(self.network, OLD)).exists():
            shutil.rmtree(old)
        places = (".stage*", "stage*/.activations.zarr", "stage*/activations.zarr/.train")
        for suffix in (NEW, OLD):
            for place in places:
                for leftover in self.path.glob(place + suffix):
                    exchange(leftover.with_name(leftover.stem.removeprefix(".")))


def new_stage(directory: Path, *, go_on: bool = False) -> AbstractContextManager[Path]:
    """A place in which to make a stage that then becomes ``directory``, see ``replacing``."""
    return replacing(directory, directory / "training", go_on=go_on)


def run_of_stage(path: Path) -> tuple[RunDirectory, int]:
    """The run and the number that a stage directory such as ``cache/stage2`` belongs to."""
    path = Path(os.path.normpath(path.absolute()))
    number = re.fullmatch(_STAGE, path.name)
    if number is None:
        raise UserError(f"{path} is not a stage directory: give one such as cache/stage2")
    if not path.is_dir():
        begun = (path.parent / "run.toml").is_file()
        data = RunDirectory.open(path.parent).record(0) if begun else None
        if data is not None and int(number[1]) > len(data.network):
            raise no_stage(int(number[1]), len(data.network))
        raise UserError(f"{path} does not exist: train stage {number[1]} first")
    return RunDirectory.open(path.parent), int(number[1])


def require_own_files(*entries: Path) -> None:
    """Refuses a run that reaches beyond its directory: what is written or deleted through a link
    would be somebody else's."""
    for entry in entries:
        _require_no_link(entry)
        for top, directories, files in os.walk(entry):
            for name in (*directories, *files):
                _require_no_link(Path(top, name))


def _require_no_link(path: Path) -> None:
    if path.is_symlink():
        raise UserError(
            f"{path} is a link, and a run's files are its own: put what it points to in its place"
        )


def stage_numbers(path: Path) -> list[int]:
    """Returns the stages that have a directory in a run, in its place or about to come to it."""
    found = rf"{_STAGE}|\.{_STAGE}{re.escape(NEW)}"
    names = (re.fullmatch(found, each.name) for each in path.iterdir()) if path.is_dir() else ()
    return sorted({int(name[1] or name[2]) for name in names if name})


def _is_unbegun(path: Path) -> bool:
    """Whether nothing is in a directory but what beginning a run leaves if it is cut short."""
    parts = (part_of(Path(name)).name for name in (HOLDER, "run.toml"))
    return {each.name for each in path.iterdir()} <= {LOCK, HOLDER, *parts}


def _is_own_source(path: Path) -> bool:
    """Whether this is the project's own source folder ``cache/``, which may hold a run too."""
    return path.name == "cache" and (path.parent / "greedy" / "runs.py").is_file()
