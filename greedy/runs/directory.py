"""A run directory: the paths in it, and what is done to it as a whole."""

import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TypeVar

from greedy.base.commands import command
from greedy.base.errors import TrainingError, UserError, no_stage
from greedy.base.files import bytes_below
from greedy.base.locking import HOLDER, LOCK, RunLock
from greedy.base.sizes import parse_size
from greedy.base.user_folders import chunks_dir
from greedy.cache import ChunkCache, Store, location_of, open_chunk_cache, remove_tree
from greedy.cache.files import part_of, rename, write_whole
from greedy.recipes import Recipe, differences, load, recipe_digest, to_toml
from greedy.runs.exchange import (
    NEW,
    OLD,
    PART,
    exchange,
    exchange_path,
    finished,
    identities,
    read_consistently,
    replacing,
)
from greedy.runs.record import HISTORY, STORE, StageRecord

Result = TypeVar("Result")
SPLITS = ("train", "test")

_STAGE = r"stage(0|[1-9][0-9]{0,8})"
# The end of the name of a training directory that cannot resume and is kept; a number follows where
# there are several.
SET_ASIDE = ".unfinished"


class RunDirectory:
    """The stores, weights and records of one run. Made by ``create`` or ``open``."""

    def __init__(self, path: Path, recipe: Recipe) -> None:
        self.path = path
        self.recipe = recipe
        self._lock = RunLock(path)

    @classmethod
    def open(cls, path: Path) -> "RunDirectory":
        """Opens an existing run. Raises ``UserError`` if there is none at ``path``."""
        if not (path / "run.toml").is_file():
            raise UserError(
                f"{path} is not a run directory (it has no run.toml): give the --run of a "
                f"`greedy train`, or start one with --recipe"
            )
        patterns = ("network*", "stage*", ".stage*")
        entries = (entry for pattern in patterns for entry in path.glob(pattern))
        require_no_links(path / "run.toml", *entries)
        return cls(path, load(path / "run.toml", inherits=False))

    @classmethod
    def create(cls, path: Path, recipe: Recipe) -> "RunDirectory":
        """Returns the run of a recipe at ``path``: an existing one whose recipe gives the same
        results, or else a new one, which is on disk only after ``write_recipe``.

        Raises ``UserError`` if the recipes differ, naming the fields, or if something else is at
        ``path``.
        """
        if (path / "run.toml").is_file():
            run = cls.open(path)
            if run.record(0) is not None:
                run._require_same_results(recipe)
            run.recipe = recipe
            return run
        if path.exists() and not path.is_dir():
            raise UserError(f"{path} is a file: choose another --run directory")
        if path.is_dir() and not (_is_unstarted(path) or _is_source_folder(path)):
            raise UserError(
                f"{path} is not empty and not a run directory: choose another --run, "
                f"nothing in it has been touched"
            )
        return cls(path, recipe)

    @contextmanager
    def write_lock(self) -> Iterator[None]:
        """Holds the run's lock: no other process writes into the run meanwhile. First completes
        the exchanges that a crash interrupted; opening a run does not, since others may read it
        while one trains."""
        with self._lock.held() as first:
            if first and (self.path / "run.toml").is_file():
                on_disk = RunDirectory.open(self.path)
                on_disk._finish_exchanges()
                if on_disk.record(0) is not None:
                    on_disk._require_same_results(self.recipe)
            yield

    def make_directory(self, option: str = "--run") -> None:
        """Makes the directory if it does not exist. Raises ``TrainingError``, which names
        ``option`` as the way to choose another path, if it cannot be made."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            parents = self.path.absolute().parents
            existing = next(parent for parent in parents if os.path.lexists(parent))
            raise TrainingError(
                f"the run directory {self.path} cannot be made in {existing} ({error.strerror}): "
                f"choose another place with {option}"
            ) from error

    def write_recipe(self) -> None:
        """Writes ``run.toml``, just before stage 0 is written: what is refused before that leaves
        no trace."""
        write_whole(self.path / "run.toml", to_toml(self.recipe).encode())

    def _require_same_results(self, recipe: Recipe) -> None:
        if changed := differences(self.recipe, recipe):
            parts = [f"{key} is {old!r} there, {new!r} here" for key, old, new in changed[:3]]
            more = [f"and {len(changed) - 3} more"] if len(changed) > 3 else []
            listed = ", ".join(parts + more)
            raise UserError(
                f"{self.path} belongs to a run with other settings ({listed}): choose another "
                f"--run, or use the settings it started with"
            )

    @property
    def recipe_digest(self) -> str:
        """The digest of the recipe's fields that decide the results."""
        return recipe_digest(self.recipe)

    def stage_dir(self, number: int) -> Path:
        """Returns the directory of a stage: ``stageN``, or the temporary name of a finished stage
        whose exchange is under way or was interrupted."""
        path = self.path / f"stage{number}"
        candidates = (path, exchange_path(path, NEW))
        return next((path for path in candidates if (path / "stage.json").is_file()), path)

    def read_consistently(self, read: Callable[[], Result], number: int | None = None) -> Result:
        """Returns the result of ``read``, which reads the run, or only stage ``number``, and is
        called again if stages, stores or views were exchanged meanwhile. So the result is of the
        old or of the new files, never of both."""
        return read_consistently(lambda: self._exchanged_paths(number), read)

    def identity(self, number: int) -> object:
        """Returns a value that differs once the stage, its store or its views are exchanged."""
        return identities(self._exchanged_paths(number))

    def _exchanged_paths(self, number: int | None) -> list[Path]:
        numbers = stage_numbers(self.path) if number is None else [number]
        return [path for n in numbers for path in (self.stage_dir(n), self.store_path(n))]

    @property
    def network_dir(self) -> Path:
        """The directory of all stages while they train at once."""
        return self.path / "network"

    def remove_network_dir(self) -> None:
        """Deletes ``network_dir`` once all stages have directories. It is renamed first: half of
        it would look like an interrupted training."""
        old = exchange_path(self.network_dir, OLD)
        rename(self.network_dir, old)
        shutil.rmtree(old)

    def training_history_path(self, number: int) -> Path:
        """Returns the file of the epochs so far of a stage in training, one line each."""
        if self.network_dir.is_dir():
            return self.network_dir / "training" / f"stage{number}.jsonl"
        return self.stage_dir(number) / "training" / HISTORY

    def store_path(self, number: int) -> Path:
        """Returns the activation store of a stage: a Zarr group with ``train`` and ``test``. The
        directory of either may stand for a store in object storage."""
        return self.stage_dir(number) / STORE

    def open_store(self, number: int, split: str) -> Store:
        """Opens a split of a stage's store. Its errors say how to repair it."""
        if number:
            repair = command("cache", "repair", self.stage_dir(number))
            advice = f"{repair} writes it as it was, then the same command resumes"
        else:
            advice = "images cannot be computed again: begin another run from the data"
        store = finished(self.store_path(number) / split)
        return Store(store, advice, self._chunk_cache())

    def _chunk_cache(self) -> ChunkCache | None:
        limit = self.recipe.store.cache
        return open_chunk_cache(chunks_dir(), parse_size(limit)) if limit else None

    def store_bytes(self, number: int) -> int:
        """Returns the bytes of a stage's store, 0 if it does not exist."""
        path = self.store_path(number)
        if not any(location_of(path / split) for split in SPLITS):
            return bytes_below(path)
        record = self.record(number)
        return record.store.bytes if record and record.store else 0

    def record(self, number: int) -> StageRecord | None:
        """Returns the record of a finished stage, ``None`` if it is not finished. Raises
        ``UserError`` if the record is damaged or is another stage's."""
        for _ in range(3):  # during an exchange a stage has one of two names
            directory = self.stage_dir(number)
            try:
                record = StageRecord.read(directory)
                break
            except (FileNotFoundError, NotADirectoryError):
                pass
        else:
            return None
        if record.stage != number:
            raise UserError(
                f"{directory} holds stage {record.stage}: rename it to its number, or delete it "
                f"and resume with {command('train', '--run', self.path)}"
            )
        return record

    def drop_stores(self, *numbers: int) -> None:
        """Deletes the stores of stages, if they exist; the stages stay complete. Does not ask
        whether an interrupted training needs one, see ``greedy.runs.unfinished``."""
        for store in map(self.store_path, numbers):
            if store.is_dir():
                rename(store, exchange_path(store, OLD))
                exchange(store)

    def _finish_exchanges(self) -> None:
        if (old := exchange_path(self.network_dir, OLD)).exists():
            shutil.rmtree(old)
        stores = (f"stage*/.{STORE}", f"stage*/{STORE}/.train")
        for pattern in stores:
            for unfinished in self.path.glob(pattern + PART):
                remove_tree(unfinished)
        patterns = (".stage*", *stores)
        for suffix in (NEW, OLD):
            for pattern in patterns:
                for leftover in self.path.glob(pattern + suffix):
                    exchange(leftover.with_name(leftover.stem.removeprefix(".")))


def new_stage(directory: Path, *, resume: bool = False) -> AbstractContextManager[Path]:
    """Yields a directory in which to make a stage, which is then renamed to ``directory``, see
    ``replacing``."""
    return replacing(directory, directory / "training", resume=resume)


def run_of_stage(path: Path) -> tuple[RunDirectory, int]:
    """Returns the run and the number of a stage directory such as ``cache/stage2``. Raises
    ``UserError`` for any other path."""
    if re.match(r"[a-z0-9]+:/", str(path)):
        raise UserError(
            "a stage is named by its directory in a run, such as cache/stage2, which says where "
            "its store is: give that, not a URL"
        )
    path = Path(os.path.normpath(path.absolute()))
    number = re.fullmatch(_STAGE, path.name)
    if number is None:
        raise UserError(f"{path} is not a stage directory: give one such as cache/stage2")
    if not path.is_dir():
        is_run = (path.parent / "run.toml").is_file()
        data = RunDirectory.open(path.parent).record(0) if is_run else None
        if data is not None and int(number[1]) > len(data.network):
            raise no_stage(int(number[1]), len(data.network))
        raise UserError(f"{path} does not exist: train stage {number[1]} first")
    return RunDirectory.open(path.parent), int(number[1])


def require_no_links(*entries: Path) -> None:
    """Raises ``UserError`` if an entry, or anything below it, is a link: files outside the run
    would be written or deleted through it."""
    for entry in entries:
        _require_no_link(entry)
        for top, directories, files in os.walk(entry):
            for name in (*directories, *files):
                _require_no_link(Path(top, name))


def _require_no_link(path: Path) -> None:
    if path.is_symlink():
        raise UserError(
            f"{path} is a link, which a run must not hold: replace it with the files it points to"
        )


def stage_numbers(path: Path) -> list[int]:
    """Returns the numbers of the stages that have a directory in a run, final or temporary."""
    pattern = rf"{_STAGE}|\.{_STAGE}{re.escape(NEW)}"
    entries = path.iterdir() if path.is_dir() else ()
    matches = (re.fullmatch(pattern, entry.name) for entry in entries)
    return sorted({int(match[1] or match[2]) for match in matches if match})


def _is_unstarted(path: Path) -> bool:
    """Returns whether a directory holds only what a run leaves that was interrupted before
    ``run.toml``."""
    parts = (part_of(Path(name)).name for name in (HOLDER, "run.toml"))
    return {entry.name for entry in path.iterdir()} <= {LOCK, HOLDER, *parts}


def _is_source_folder(path: Path) -> bool:
    """Returns whether this is the source folder ``cache/`` of a checkout, which may hold a run
    too."""
    return path.name == "cache" and (path.parent / "greedy" / "runs" / "directory.py").is_file()
