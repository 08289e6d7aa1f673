"""Reproduction of the paper's experiments: their recipes, run directories and results."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from greedy.base.errors import UserError
from greedy.base.files import read_with_digest, with_digest
from greedy.cache.files import write_whole
from greedy.data import Reading, load_dataset
from greedy.recipes import Recipe, describe, load, names, of_table, recipe_digest
from greedy.results.evaluation import evaluate
from greedy.runs.directory import RunDirectory, stage_numbers
from greedy.runs.events import Reporter
from greedy.runs.state import RunState
from greedy.runs.unfinished import stores_needed
from greedy.stores.changes import require_unchanged
from greedy.trainer import GreedyTrainer

PATTERN = set("*?[")
END_TO_END = ("backprop", "glob+sim")  # strategies that have rows in the paper's tables


def _quiet() -> AbstractContextManager[Reporter]:
    return nullcontext(Reporter())


@dataclass
class SeededRun:
    """One training of a row's recipe. A JSON document next to its directory keeps the test error.

    Attributes:
        recipe: the recipe with the seed of this run.
        path: the run directory.
        error_percent: test error of the assembled network, ``None`` until it is evaluated.
    """

    recipe: Recipe
    path: Path
    error_percent: float | None = None

    @property
    def document(self) -> Path:
        """The file that keeps the evaluation, the recipe's name and the seed."""
        return self.path.with_name(f"{self.path.name}.json")

    def read(self) -> None:
        """Reads the test error if there is one. Raises ``UserError`` if the document is damaged."""
        if not self.document.is_file():
            return
        try:
            error_percent = read_with_digest(self.document).get("error_percent")
            if not isinstance(error_percent, float):
                raise ValueError("it holds no test error")
        except ValueError as error:
            raise UserError(
                f"{self.document} is damaged ({error}): delete it and give the same command again"
            ) from error
        self.error_percent = error_percent

    def finish(
        self,
        *,
        data_dir: Path | None = None,
        download: bool = False,
        allow_function: bool = False,
        device: str = "auto",
        reporter: Callable[[], AbstractContextManager[Reporter]] = _quiet,
    ) -> None:
        """Trains the unfinished stages, evaluates the network, writes the document, and deletes the
        activation stores of all stages but the images.

        Args:
            data_dir: as for ``load_dataset``.
            download: as for ``load_dataset``.
            allow_function: as for ``load_dataset``.
            device: as for ``GreedyTrainer``.
            reporter: makes the reporter of each part of the work.
        """
        if self.error_percent is None:
            trainer = GreedyTrainer.from_recipe(self.recipe, self.path, device=device)
            data = self.recipe.data
            if trainer.needs_data():
                dataset = load_dataset(
                    data.name,
                    data_dir,
                    download,
                    data.image_size,
                    allow_function,
                    Reading.of(data),
                )
                with reporter() as trainer.reporter:
                    trainer.prepare(dataset)
            else:
                require_unchanged(trainer.run, data_dir, allow_function)
            with reporter() as trainer.reporter:
                trainer.train()
            self._evaluate(trainer)
        self._drop_stores()

    def _evaluate(self, trainer: GreedyTrainer) -> None:
        result = evaluate(trainer.run, trainer.assemble(), "test", trainer.device)
        identity = {"recipe": self.recipe.name, "seed": self.recipe.seed}
        write_whole(self.document, with_digest({**identity, **asdict(result)}))
        self.error_percent = result.error_percent

    def _drop_stores(self) -> None:
        run = RunDirectory.create(self.path, self.recipe)
        state, needed = RunState.read(run), stores_needed(run)
        stored = filter(state.has_store, stage_numbers(run.path))
        unneeded = [number for number in stored if number and number not in needed]
        if unneeded:
            with run.write_lock():
                run.drop_stores(*unneeded)


@dataclass(frozen=True)
class Row:
    """One row of the table: the recipe with the given name, and its runs, one for each seed."""

    name: str
    runs: Sequence[SeededRun]

    @property
    def recipe(self) -> Recipe:
        """The recipe of the first seed."""
        return self.runs[0].recipe

    @property
    def errors_percent(self) -> list[float]:
        """The test errors of the finished runs."""
        return [run.error_percent for run in self.runs if run.error_percent is not None]

    @property
    def mean(self) -> float | None:
        """The mean test error of the finished runs, ``None`` if there are none."""
        errors = self.errors_percent
        return sum(errors) / len(errors) if errors else None

    @property
    def finished(self) -> bool:
        """Whether all runs are finished."""
        return len(self.errors_percent) == len(self.runs)


def rows(
    selection: Iterable[str],
    overrides: Sequence[str] = (),
    *,
    epochs_scale: float = 1,
    seeds: int = 1,
    to: Path = Path("runs/reproduce"),
) -> list[Row]:
    """Makes the rows of a table.

    Args:
        selection: numbers of the paper's tables, names or files of recipes, and shell patterns for
            the names of recipes with a published error.
        overrides: changes of fields, as for a recipe; ``training.strategy`` only concerns rows with
            a local loss.
        epochs_scale: a factor on all numbers of epochs.
        seeds: number of runs in a row, their seeds counted from the recipe's.
        to: the directory of all runs; runs with different results have different directories.

    Raises:
        UserError: there is no such table or recipe, or an override is not possible.
    """
    table, shipped = [], names()
    for name in _names(selection):
        recipe = _recipe(name, overrides, epochs_scale)
        directory = to / (name if name in shipped else Path(name).stem)
        runs = [_run(recipe, seed, directory) for seed in range(recipe.seed, recipe.seed + seeds)]
        table.append(Row(name, runs))
    return table


def _names(selection: Iterable[str]) -> list[str]:
    selected: list[str] = []
    for item in selection:
        if item.isdecimal():
            selected += of_table(int(item))
        elif PATTERN & set(item):
            selected += _matching(item)
        else:
            selected.append(item)
    return list(dict.fromkeys(selected))


def _matching(pattern: str) -> list[str]:
    published = (row["name"] for row in describe() if row["table"])
    matching = [name for name in published if fnmatchcase(name, pattern)]
    if not matching:
        raise UserError(
            f"no recipe with a published error matches {pattern}: `greedy recipes list` shows all"
        )
    return matching


def _recipe(name: str, overrides: Sequence[str], epochs_scale: float) -> Recipe:
    if load(name).training.strategy in END_TO_END:
        overrides = [
            override
            for override in overrides
            if override.partition("=")[0].strip() != "training.strategy"
        ]
    return load(name, overrides, epochs_scale=epochs_scale)


def _run(recipe: Recipe, seed: int, directory: Path) -> SeededRun:
    """Returns the run of a seed, with its test error if it is finished."""
    seeded = recipe.model_copy(update={"seed": seed})
    settings_digest = recipe_digest(seeded)[:8]
    name = f"{seeded.training.strategy}-seed{seed}-{settings_digest}"
    run = SeededRun(seeded, directory / name)
    run.read()
    return run
