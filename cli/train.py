"""``greedy train`` and ``greedy train-stage``: training all stages or one."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING

import click

from greedy.base.commands import command
from greedy.base.sizes import percent, size
from greedy.cli import fields, options
from greedy.cli.failures import terminable
from greedy.cli.tables import print_table, say, waiting

if TYPE_CHECKING:
    from greedy.cli.progress import Lines
    from greedy.recipes import Recipe
    from greedy.results.tensorboard import TensorBoard
    from greedy.runs.record import StageRecord
    from greedy.trainer import GreedyTrainer
    from greedy.training.following import Parallel


@contextmanager
def together() -> Iterator[None]:
    """Joins the other processes if torchrun started this one. Only the one that leads prints."""
    from greedy.base.ranks import Ranks  # noqa: PLC0415

    ranks = Ranks.of_torchrun()
    with (
        Path(os.devnull).open("w", encoding="utf-8") as nowhere,
        nullcontext() if ranks.leads else redirect_stdout(nowhere),
    ):
        yield
    ranks.leave()


@click.command(
    cls=fields.Command,
    epilog="Example: greedy train --recipe demo --set training.epochs=2 --run runs/short",
)
@options.recipe
@options.run_or_new
@fields.settings
@options.data_dir
@options.download
@options.device
@options.refresh_device
@click.option(
    "--parallel",
    cls=fields.Option,
    group=fields.MACHINE,
    type=click.Choice(["data", "stages"]),
    metavar="data|stages",
    default="data",
    show_default=True,
    help="What the processes of torchrun divide: the rows of each batch, or with --strategy joint "
    "the stages.",
)
@click.option(
    "--retrain",
    metavar="[STAGE]",
    type=int,
    is_flag=False,
    flag_value=1,
    help="Train this stage and all after it again, by default from stage 1; 0 also reads changed "
    "data again.",
)
@options.ignore_changes
@options.log
@options.network
@options.debug
@together()
def train(
    recipe_name: str | None,
    run: Path | None,
    settings: tuple[str, ...],
    data_dir: Path | None,
    download: bool,
    device: str,
    refresh_device: str | None,
    parallel: "Parallel",
    retrain: int | None,
    ignore_changes: bool,
    log: str | None,
    model: str | None,
    **field_values: str | None,
) -> None:
    """Train every stage of a recipe in turn; the same command resumes."""
    from greedy.build.modules import load_network  # noqa: PLC0415
    from greedy.cli.progress import preparing  # noqa: PLC0415
    from greedy.data import Reading, load_dataset  # noqa: PLC0415
    from greedy.stores.changes import require_unchanged  # noqa: PLC0415
    from greedy.trainer import GreedyTrainer  # noqa: PLC0415

    overrides = fields.overrides(settings, field_values)
    recipe, directory = recipe_and_run(recipe_name, run, overrides, model)
    network = load_network(recipe, model, needed=True)
    trainer = GreedyTrainer.from_recipe(
        recipe,
        directory,
        device=device,
        refresh_device=refresh_device,
        model=network,
        parallel=parallel,
    )
    logger = tensorboard(directory) if log and trainer.ranks.leads else None
    say(f"{recipe.name} in {directory} on {trainer.device}")
    data, data_named = recipe.data, fields.names_data(overrides)
    if retrain == 0 or trainer.needs_data(retrain):
        reading = Reading.of(data)
        with trainer.ranks.in_turn():  # it may be downloaded
            dataset = load_dataset(
                data.name, data_dir, download, data.image_size, data_named, reading
            )
        rows = f"{len(dataset.train):,} training and {len(dataset.test):,} test images"
        say(f"stage 0: {rows} of {dataset.name}")
        with terminable(), preparing() as trainer.reporter:
            trainer.prepare(dataset, again=retrain == 0, ignore_changes=ignore_changes)
        retrain = 1 if retrain == 0 else retrain
    elif not ignore_changes and trainer.ranks.leads:
        with terminable(), waiting("comparing the data with those stored"):
            require_unchanged(trainer.run, data_dir, data_named)
    train_and_show(trainer, retrain, logger)


@click.command(
    "train-stage",
    cls=fields.Command,
    epilog="Example: greedy train-stage --stage 3 --from-cache cache/stage2",
)
@click.option(
    "--stage", "number", required=True, type=int, metavar="N", help="The number of the stage."
)
@click.option(
    "--from-cache",
    "source",
    required=True,
    metavar="DIR",
    type=options.PATH,
    help="The directory of an earlier stage, from whose store the stage is trained.",
)
@click.option(
    "--to",
    metavar="DIR",
    type=options.PATH,
    help="The stage directory to write  [default: stageN in the run].",
)
@click.option("--retrain", is_flag=True, help="Train the stage again if it is complete.")
@options.ignore_changes
@fields.field_option("memory_budget", fields.MEMORY)
@fields.field_option("optimizer_state", fields.MEMORY)
@options.device
@options.refresh_device
@options.log
@options.model
@options.data_function
@options.debug
@together()
def train_stage(
    number: int,
    source: Path,
    to: Path | None,
    retrain: bool,
    ignore_changes: bool,
    memory_budget: str | None,
    optimizer_state: str | None,
    device: str,
    refresh_device: str | None,
    log: str | None,
    model: str | None,
    data: str | None,
) -> None:
    """Train one stage from the store of an earlier one."""
    from greedy.build.modules import load_network  # noqa: PLC0415
    from greedy.runs.directory import run_of_stage  # noqa: PLC0415
    from greedy.runs.state import RunState  # noqa: PLC0415
    from greedy.trainer import GreedyTrainer  # noqa: PLC0415

    run, source_number = run_of_stage(source)
    field_values = {"memory_budget": memory_budget, "optimizer_state": optimizer_state}
    recipe, _ = recipe_and_run(None, run.path, fields.overrides((), field_values))
    trainer = GreedyTrainer.from_recipe(
        recipe,
        run.path,
        device=device,
        refresh_device=refresh_device,
        model=load_network(recipe, model, needed=True),
    )
    give_data(trainer, data, ignore_changes=ignore_changes)
    logs = log and trainer.ranks.leads
    with reporting(trainer, tensorboard(run.path, to) if logs else None) as progress:
        record = trainer.train_stage(
            number, source=source_number, again=retrain, to=to, ignore_changes=ignore_changes
        )
    written = to or run.stage_dir(number)
    if progress.skipped:
        say(f"{written} is already complete: --retrain trains it again")
    else:
        say(f"wrote {written}, trained from {_origin(record)}")
        state = RunState.read(run)
        later = range(number + 1, len(state.complete_record(0).network) + 1)
        if to is None and (stale := [n for n in later if state.is_stale(n)]):
            say(
                f"{_stages_in_words(stale)} became stale with the new stage {number}: "
                f"{command('train', '--run', run.path, '--retrain', stale[0])} trains from there on"
            )


def train_and_show(
    trainer: "GreedyTrainer", retrain: int | None = None, log: "TensorBoard | None" = None
) -> None:
    """Trains the unfinished stages of a run that has its images, and prints the results."""
    with reporting(trainer, log):
        trainer.train(retrain)
    if trainer.ranks.leads:
        _print_results(trainer)


def give_data(
    trainer: "GreedyTrainer", function: str | None, *, ignore_changes: bool = False
) -> None:
    """Gives a trainer the data sets that a function returns, if it is named."""
    from greedy.data import Reading  # noqa: PLC0415
    from greedy.data.mapstyle import load_function  # noqa: PLC0415

    if function is not None:
        background = Reading.of(trainer.recipe.data).background
        with terminable(), waiting("comparing the data with those stored"):
            dataset = load_function(function, background)
            trainer.prepare(dataset, ignore_changes=ignore_changes)


def tensorboard(run: Path, to: Path | None = None) -> "TensorBoard":
    """Returns the writer of a run's logs. Raises ``UserError`` where logs cannot be written."""
    from greedy.results.tensorboard import TensorBoard  # noqa: PLC0415

    return TensorBoard(run, to=to)


@contextmanager
def reporting(trainer: "GreedyTrainer", log: "TensorBoard | None") -> Iterator["Lines"]:
    """Shows what the trainer does inside, logs it to ``log`` if given, and lets signals stop it."""
    from greedy.cli.dashboard import reporter  # noqa: PLC0415
    from greedy.runs.events import Reporters  # noqa: PLC0415

    progress = reporter()
    trainer.reporter = Reporters(progress, log) if log else progress
    with progress, log or nullcontext(), terminable():
        yield progress


def recipe_and_run(
    name: str | None, run: Path | None, overrides: list[str], model: str | None = None
) -> tuple["Recipe", Path]:
    """Returns the recipe and the run directory that --recipe, --run and --model stand for."""
    from greedy.recipes import names  # noqa: PLC0415
    from greedy.recipes.loader import load_for_model  # noqa: PLC0415
    from greedy.runs.directory import RunDirectory  # noqa: PLC0415

    if name is not None:
        recipe = load_for_model(name, model, overrides)
        if run is None:
            run = Path("runs") / (name if name in names() else Path(name).stem)
        return recipe, run
    if run is None:
        raise click.UsageError("give --recipe to begin a run, or --run to resume one")
    return load_for_model(RunDirectory.open(run).path / "run.toml", model, overrides), run


def _stages_in_words(numbers: list[int]) -> str:
    """Writes a range of stages in words."""
    first, last = numbers[0], numbers[-1]
    return f"stage {first}" if first == last else f"stages {first} to {last}"


def _origin(record: "StageRecord") -> str:
    """Describes the store that a stage was trained from, and the stages that were replayed."""
    source = record.source or 0
    between = range(source + 1, record.stage)
    replayed = f" with {', '.join(f'stage {n}' for n in between)} replayed" if between else ""
    return f"stage {source}'s store{replayed}"


def _print_results(trainer: "GreedyTrainer") -> None:
    from greedy.recipes import departures  # noqa: PLC0415
    from greedy.results.evaluation import evaluate  # noqa: PLC0415
    from greedy.runs.state import RunState  # noqa: PLC0415
    from greedy.runs.status import status  # noqa: PLC0415

    print_table(
        ("stage", "name", "train err", "test err", "store", "memory", "images/s", "seconds"),
        (
            (
                str(stage.stage),
                stage.name,
                percent(stage.train_error_percent),
                percent(stage.test_error_percent),
                size(stage.store_bytes),
                size(stage.step_memory_bytes),
                f"{stage.images_per_second:,.0f}",
                f"{stage.seconds:,.1f}",
            )
            for stage in status(RunState.read(trainer.run))
        ),
        text_columns=2,
    )
    with waiting("evaluating on the raw test images"):
        result = evaluate(trainer.run, trainer.assemble(), "test", trainer.device)
    say(f"test error {percent(result.error_percent)} on {result.samples:,} images")
    own_data = ":" in trainer.recipe.data.name  # a folder or function, not the paper's data
    if (paper := trainer.recipe.paper) and not own_data:
        changed = departures(trainer.recipe)
        note = f", but with other {', '.join(changed)}" if changed else ""
        say(f"the paper: {percent(paper.test_error_percent)} (table {paper.table}){note}")
