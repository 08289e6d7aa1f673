"""The paper's figures made again: which recipes, where they run, and what has come of them."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from greedy.base.errors import UserError
from greedy.base.files import canonical, digest, read_signed, signed
from greedy.cache.files import write_whole
from greedy.data import Reading, load_dataset
from greedy.recipes import Recipe, describe, load, names, of_table, result_fields
from greedy.results.evaluation import evaluate
from greedy.runs.directory import RunDirectory, stage_numbers
from greedy.runs.events import Reporter
from greedy.runs.unfinished import trainings_needing
from greedy.stores.changes import require_unchanged
from greedy.trainer import GreedyTrainer

PATTERN = set("*?[")
FROM_THE_END = ("backprop", "glob+sim")  # the paper's other ways of training, rows of their own


def _quiet() -> AbstractContextManager[Reporter]:
    return nullcontext(Reporter())


@dataclass
class SeededRun:
    """One training of a row's recipe. A document beside its directory keeps the figure.

    Attributes:
        recipe: with its seed.
        path: of the run directory.
        figure: test error of the assembled network in percent, ``None`` until there is one.
    """

    recipe: Recipe
    path: Path
    figure: float | None = None

    @property
    def document(self) -> Path:
        """What keeps the figure: the evaluation, the recipe's name and the seed."""
        return self.path.with_name(f"{self.path.name}.json")

    def read(self) -> None:
        """Looks for the figure. Raises ``UserError`` if the document is damaged."""
        if not self.document.is_file():
            return
        try:
            figure = read_signed(self.document).get("error_percent")
            if not isinstance(figure, float):
                raise ValueError("it holds no error")
        except ValueError as error:
            raise UserError(
                f"{self.document} is damaged ({error}): delete it and give the same command again"
            ) from error
        self.figure = figure

    def finish(
        self,
        *,
        data_dir: Path | None = None,
        download: bool = False,
        allow_function: bool = False,
        device: str = "auto",
        reporter: Callable[[], AbstractContextManager[Reporter]] = _quiet,
    ) -> None:
        """Trains what is not trained yet, evaluates the network and keeps the figure; then, as
        they are needed no more, deletes the activation stores of all stages but the images.

        ``data_dir``, ``download`` and ``allow_function`` are those of ``load_dataset``;
        ``reporter`` gives the one to tell.
        """
        if self.figure is None:
            trainer = GreedyTrainer.from_recipe(self.recipe, self.path, device=device)
            data = self.recipe.data
            if trainer.run.state(0) != "complete":
                found = load_dataset(
                    data.name,
                    data_dir,
                    download,
                    data.image_size,
                    allow_function,
                    Reading.of(data),
                )
                with reporter() as trainer.reporter:
                    trainer.prepare(found)
            else:
                require_unchanged(trainer.run, data_dir, allow_function)
            with reporter() as trainer.reporter:
                trainer.train()
            self._keep(trainer)
        self._drop_stores()

    def _keep(self, trainer: GreedyTrainer) -> None:
        result = evaluate(trainer.run, trainer.assemble(), "test", trainer.device)
        known = {"recipe": self.recipe.name, "seed": self.recipe.seed}
        write_whole(self.document, signed({**known, **asdict(result)}))
        self.figure = result.error_percent

    def _drop_stores(self) -> None:
        run = RunDirectory.create(self.path, self.recipe)
        there = [
            n
            for n in stage_numbers(run.path)
            if n and run.store_path(n).is_dir() and not trainings_needing(run, n)
        ]
        if there:
            with run.write_lock():
                run.drop_stores(*there)


@dataclass(frozen=True)
class Row:
    """One line of the table: a recipe, as it was asked for, and its runs, one a seed."""

    name: str
    runs: Sequence[SeededRun]

    @property
    def recipe(self) -> Recipe:
        """The recipe of the first seed."""
        return self.runs[0].recipe

    @property
    def figures(self) -> list[float]:
        """The figures of the runs that are finished."""
        return [run.figure for run in self.runs if run.figure is not None]

    @property
    def mean(self) -> float | None:
        """The mean over the finished runs, ``None`` if there are none."""
        return sum(self.figures) / len(self.figures) if self.figures else None

    @property
    def finished(self) -> bool:
        """Whether all runs are."""
        return len(self.figures) == len(self.runs)


def rows(
    wanted: Iterable[str],
    overrides: Sequence[str] = (),
    *,
    epochs_scale: float = 1,
    seeds: int = 1,
    to: Path = Path("runs/reproduce"),
) -> list[Row]:
    """The rows that were asked for: by numbers of the paper's tables, by names or files of
    recipes, and by shell patterns of the names of those with a published figure.

    ``overrides`` are those of a recipe; the strategy among them is for rows with a local loss.
    ``seeds`` are counted from the recipe's own. Whatever decides a result has its own run
    directory below ``to``. Raises ``UserError`` for anything that is not there or not possible.
    """
    found, shipped = [], names()
    for name in _names(wanted):
        recipe = _recipe(name, overrides, epochs_scale)
        place = to / (name if name in shipped else Path(name).stem)
        runs = [_run(recipe, seed, place) for seed in range(recipe.seed, recipe.seed + seeds)]
        found.append(Row(name, runs))
    return found


def _names(wanted: Iterable[str]) -> list[str]:
    found: list[str] = []
    for each in wanted:
        if each.isdecimal():
            found += of_table(int(each))
        elif PATTERN & set(each):
            found += _like(each)
        else:
            found.append(each)
    return list(dict.fromkeys(found))


def _like(pattern: str) -> list[str]:
    published = (row["name"] for row in describe() if row["table"])
    found = [name for name in published if fnmatchcase(name, pattern)]
    if not found:
        raise UserError(
            f"no recipe with a published figure is called like {pattern}: "
            f"`greedy recipes list` shows all"
        )
    return found


def _recipe(name: str, overrides: Sequence[str], epochs_scale: float) -> Recipe:
    if load(name).training.strategy in FROM_THE_END:
        keys = (each.partition("=")[0].strip() for each in overrides)
        pairs = zip(keys, overrides, strict=True)
        overrides = [each for key, each in pairs if key != "training.strategy"]
    return load(name, overrides, epochs_scale=epochs_scale)


def _run(recipe: Recipe, seed: int, place: Path) -> SeededRun:
    """A run in a directory of its own, and its figure if there is one."""
    seeded = recipe.model_copy(update={"seed": seed})
    settings = digest(canonical(result_fields(seeded)))[:8]
    run = SeededRun(seeded, place / f"{seeded.training.strategy}-seed{seed}-{settings}")
    run.read()
    return run
