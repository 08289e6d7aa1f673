"""``greedy status``, ``evaluate`` and ``export``: the state and the results of a run."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from greedy.base.commands import command
from greedy.base.sizes import percent, size
from greedy.cli import options
from greedy.cli.tables import count, print_json, print_table, say, waiting

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from greedy.results.evaluation import Evaluation
    from greedy.results.exits import Exits
    from greedy.runs.directory import RunDirectory
    from greedy.runs.status import StageStatus, StoreStatus

LOSE = 1.0  # the default: points of error that an early exit may lose
MOST_CLASSES = 20  # in the table of `greedy evaluate`


@click.command(epilog="Example: greedy status --run runs/demo")
@options.run
@options.as_json
@options.debug
def status(run: Path, as_json: bool) -> None:
    """Show the stages of a run: state, errors, store, views and time.

    REUSE is the number of epochs after which a store's oldest view is replaced, 0 for never; HELD
    are the numbers of the views that it has now, WRITTEN all bytes ever written into it.
    """
    from greedy.runs.directory import RunDirectory  # noqa: PLC0415
    from greedy.runs.state import RunState  # noqa: PLC0415
    from greedy.runs.status import disk_use, status, trainings_set_aside  # noqa: PLC0415

    directory = RunDirectory.open(run)
    state = RunState.read(directory)
    stages, disk = status(state), disk_use(state)
    set_aside = trainings_set_aside(directory)
    if as_json:
        paths = [asdict(training) | {"path": str(training.path)} for training in set_aside]
        found = {"stages": [asdict(stage) for stage in stages], **asdict(disk), "set_aside": paths}
        print_json({"recipe": directory.recipe.name, **found})
        return
    say(f"{directory.recipe.name} in {run}")
    if not stages:
        writing = command("train", "--run", run)
        say(f"stage 0, the data set, is not written: {writing} writes it")
        return
    _print_stages(stages)
    say(
        f"stores, with the images: {size(disk.bytes_on_disk)} on disk, "
        f"{size(disk.bytes_written)} written since the run began"
    )
    for training in set_aside:
        when = f" after {training.progress}" if training.progress else ""
        say(
            f"{training.path}: a training interrupted{when} and set aside, {size(training.bytes)}: "
            f"it is resumed once what it trained from is there again; otherwise delete it"
        )


def _print_stages(stages: "Sequence[StageStatus]") -> None:
    print_table(
        ("stage", "name", "state", "train err", "test err", "store", "B/value", "seconds"),
        (
            (
                str(stage.stage),
                stage.name,
                stage.state,
                percent(stage.train_error_percent),
                percent(stage.test_error_percent),
                size(stage.store_bytes),
                "-" if stage.bytes_per_value is None else f"{stage.bytes_per_value:.2f}",
                "-" if stage.seconds is None else f"{stage.seconds:,.0f}",
            )
            for stage in stages
        ),
        text_columns=3,
    )
    print_stores((s.stage, s.store) for s in stages if s.store)
    for stage in stages:
        if max(stage.processes or [1]) > 1:
            say(f"stage {stage.stage} was trained by {stage.trained_by} processes together")


@click.command(epilog="Example: greedy evaluate --run runs/demo --split test")
@options.run
@click.option(
    "--split",
    metavar="test|train",
    default="test",
    show_default=True,
    help="The images to evaluate on, not augmented.",
)
@options.memory_budget
@click.option("--by-stage", is_flag=True, help="Also evaluate every early exit.")
@click.option(
    "--lose",
    metavar="X",
    type=float,
    help="With --by-stage: points of error that an early exit may lose  [default: 1.0].",
)
@options.device
@options.model
@options.as_json
@options.debug
def evaluate(
    run: Path,
    split: str,
    memory_budget: str | None,
    by_stage: bool,
    lose: float | None,
    device: str,
    model: str | None,
    as_json: bool,
) -> None:
    """Evaluate the trained network on raw images, in float32.

    The balanced error is the mean of the errors of all classes. Operations are multiply-adds of
    convolutions and linear layers for one image.
    """
    from greedy.base.devices import pick_device  # noqa: PLC0415
    from greedy.base.sizes import parse_size  # noqa: PLC0415
    from greedy.build.modules import build_loss, load_network  # noqa: PLC0415
    from greedy.results.evaluation import evaluate  # noqa: PLC0415
    from greedy.results.exits import evaluate_exits  # noqa: PLC0415
    from greedy.runs.directory import RunDirectory  # noqa: PLC0415
    from greedy.runs.network import assemble  # noqa: PLC0415

    if lose is not None and not by_stage:
        raise click.UsageError("--lose is for early exits: give --by-stage with it")
    directory = RunDirectory.open(run)
    recipe = directory.recipe
    network = load_network(recipe, model)
    torch_device = pick_device(device)
    budget = parse_size(memory_budget) if memory_budget else None
    print_changes(directory)
    if by_stage:
        loss = build_loss(recipe.loss)
        with waiting("evaluating every early exit"):
            exits = evaluate_exits(directory, loss, network, split, torch_device, budget)
        _show_exits(exits, LOSE if lose is None else lose, as_json)
        return
    with waiting("evaluating"):
        result = evaluate(
            directory, assemble(directory, None, network), split, torch_device, budget
        )
    if as_json:
        print_json(asdict(result))
        return
    _show_evaluation(result)


def _show_evaluation(result: "Evaluation") -> None:
    say(
        f"{result.split} error {percent(result.error_percent)}, loss {result.loss:.4f} "
        f"on {result.samples:,} images"
    )
    top5 = result.top5_error_percent
    also = "" if top5 is None else f", top-5 error {percent(top5)}"
    say(f"balanced error {percent(result.balanced_error_percent)}{also}")
    shown = result.by_class
    if len(shown) > MOST_CLASSES:
        shown = sorted(shown, key=lambda each: -(each.error_percent or 0))[:MOST_CLASSES]
        say(f"the {MOST_CLASSES} classes with the largest errors (--json has all):")
    rows = ((each.name, f"{each.samples:,}", percent(each.error_percent)) for each in shown)
    print_table(("class", "images", "error"), rows, text_columns=1)


def print_stores(stores: "Iterable[tuple[int, StoreStatus]]") -> None:
    """Prints a table of the views of stages' stores, if there are any."""
    rows = [
        (str(n), str(store.views), str(store.reuse), store.held, size(store.bytes_written))
        for n, store in stores
    ]
    if rows:
        print_table(("stage", "views", "reuse", "held", "written"), rows, text_columns=1)


def print_changes(run: "RunDirectory") -> None:
    """Prints on standard error how the image folder of a run has changed since it was stored."""
    from greedy.stores.changes import describe_folder_changes  # noqa: PLC0415

    if changes := describe_folder_changes(run):
        name = run.recipe.data.name
        say(
            f"{name} has changed since {run.path} stored its images ({changes}): the stored images "
            f"are used",
            err=True,
        )


def _show_exits(exits: "Exits", lose: float, as_json: bool) -> None:
    cheapest = exits.cheapest(lose)
    if as_json:
        stage = None if cheapest is None else cheapest.stage
        print_json({**asdict(exits), "lose_points": lose, "cheapest_stage": stage})
        return
    whole = exits.exits[-1]
    print_table(
        ("stage", "name", "error", "loss", "params", "operations", "of all"),
        (
            (
                str(exit.stage),
                exit.name,
                percent(exit.error_percent),
                "-" if exit.loss is None else f"{exit.loss:.4f}",
                count(exit.parameters),
                count(exit.operations),
                f"{100 * exit.operations / whole.operations:.1f} %",
            )
            for exit in exits.exits
        ),
        text_columns=2,
    )
    say(f"{exits.split} split, {exits.samples:,} images")
    if cheapest is None:
        say(f"no early exit loses less than {lose:g} {'point' if lose == 1 else 'points'}")
        return
    lost, saved = exits.points_lost(cheapest), 100 * (1 - cheapest.operations / whole.operations)
    error = f"loses {lost:.2f} points" if lost >= 0 else f"is better by {-lost:.2f} points"
    work = f"saves {saved:.1f} % of the" if saved >= 0 else f"takes {-saved:.1f} % more"
    say(f"stage {cheapest.stage} {error} and {work} operations")


@click.command(epilog="Example: greedy export --run runs/demo --to demo.onnx")
@options.run
@click.option("--to", required=True, metavar="FILE", type=options.PATH, help="The file to write.")
@click.option(
    "--format",
    metavar="safetensors|torch-export|onnx",
    help="The file's format  [default: by its suffix: .safetensors, .pt2 or .onnx].",
)
@options.until_stage
@click.option("--force", is_flag=True, help="Overwrite FILE if it exists.")
@options.model
@options.debug
def export(
    run: Path, to: Path, format: str | None, until_stage: int | None, force: bool, model: str | None
) -> None:
    """Write the trained network as one file, with its normalisation inside."""
    from greedy.build.modules import build_loss, load_network  # noqa: PLC0415
    from greedy.results.export import export, format_of  # noqa: PLC0415
    from greedy.runs.directory import RunDirectory  # noqa: PLC0415

    format = format or format_of(to)
    directory = RunDirectory.open(run)
    recipe = directory.recipe
    network = load_network(recipe, model)
    loss = None if until_stage is None else build_loss(recipe.loss)
    export(directory, loss, network, to, format, until_stage, overwrite=force)
    say(f"wrote {to} ({format}, {size(to.stat().st_size)})")
