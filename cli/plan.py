"""``greedy plan``: a forecast of memory, disk and time before anything runs."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Console

from greedy.base.sizes import duration, size
from greedy.base.text import sides
from greedy.cli import fields, options
from greedy.cli.tables import count, print_json, print_table
from greedy.cli.train import recipe_and_run

if TYPE_CHECKING:
    from collections.abc import Sequence

    from greedy.forecasts.forecast import DataFacts, Forecast, StageForecast
    from greedy.forecasts.machine import Machine
    from greedy.memory.drawing import DrawingDevice
    from greedy.recipes import Recipe

UNMEASURED = (
    "times are unknown where no similar stage was measured: `greedy bench` with the same recipe "
    "and settings measures them"
)
ALONE = "times are only known where one process trains"
NO_STAGES = "times are only known where stages are trained one at a time"


@click.command(
    cls=fields.Command,
    epilog="Example: greedy plan --recipe cifar10/vgg11b-3x-predsim --memory-budget 768MiB",
)
@options.recipe
@options.run_or_new
@fields.settings
@options.device
@options.refresh_device
@options.network
@options.images
@options.classes
@click.option(
    "--processes",
    metavar="N",
    type=click.IntRange(min=1),
    default=1,
    help="Count the memory of each of N processes that torchrun starts on one machine.",
)
@options.as_json
@options.debug
def plan(
    recipe_name: str | None,
    run: Path | None,
    settings: tuple[str, ...],
    device: str,
    refresh_device: str | None,
    model: str | None,
    images: tuple[int, int] | None,
    classes: int | None,
    processes: int,
    as_json: bool,
    **field_values: str | None,
) -> None:
    """Forecast what a run will take: memory, disk, operations and time of each stage.

    Peaks of memory are counted on tensors without contents; neither data nor GPU are used and
    nothing is written. A data set that `greedy data list` shows need not be on this machine, nor a
    folder with --images and --classes, nor a GPU for --device cuda. Operations are those of the
    plain step over all epochs; a multiply-add counts as 2. Times, known once `greedy bench` has
    measured this machine, are those of training a stage and writing its store.

    REUSE is the number of epochs after which a store's oldest view is replaced by a new one, 0 for
    never; WRITTEN are all bytes that a run writes into it; DRAWING is the share of a stage's
    operations that draws new views of the store that it trains from.
    """
    from greedy.build.modules import load_network  # noqa: PLC0415
    from greedy.forecasts.forecast import (  # noqa: PLC0415
        data_facts,
        forecast,
        stated_data_facts,
    )
    from greedy.forecasts.machine import machine  # noqa: PLC0415
    from greedy.runs.directory import RunDirectory  # noqa: PLC0415
    from greedy.training.calibration import Calibration, NotCalibrated  # noqa: PLC0415

    overrides = fields.overrides(settings, field_values)
    recipe, directory = recipe_and_run(recipe_name, run, overrides, model)
    network = load_network(recipe, model)
    if run is None and not _can_train_in(directory, recipe):
        directory = directory.with_name(f"{directory.name}-planned")
    planned = RunDirectory.create(directory, recipe)
    stated = stated_data_facts(recipe, images, classes)
    data = data_facts(planned, fields.names_data(overrides), stated)
    computer = machine(recipe, device, refresh_device, processes)
    calibration, unknown = None, UNMEASURED if recipe.training.strategy == "greedy" else NO_STAGES
    if processes > 1:
        unknown = ALONE
    else:
        try:
            calibration = Calibration.load(computer.device)
        except NotCalibrated as reason:
            unknown = str(reason)
    with Console(stderr=True).status("counting the memory of every step"):
        result = forecast(planned, data, computer, network, calibration)
    if as_json:
        print_json(_document(recipe, computer, result))
    else:
        _print(recipe, data, computer, result, unknown)


def _can_train_in(directory: Path, recipe: "Recipe") -> bool:
    """Returns whether the recipe can be trained in ``directory``: it is free or holds its run."""
    from greedy.base.errors import UserError  # noqa: PLC0415
    from greedy.runs.directory import RunDirectory  # noqa: PLC0415

    try:
        RunDirectory.create(directory, recipe)
    except UserError:
        return False
    return True


def _document(recipe: "Recipe", machine: "Machine", forecast: "Forecast") -> dict[str, object]:
    return {
        "recipe": recipe.name,
        **asdict(machine),
        "batch_size": recipe.training.batch_size,
        "stages": [
            asdict(stage) | {"drawing_share": stage.drawing_share} for stage in forecast.stages
        ],
        "peak_memory_bytes": forecast.peak_memory_bytes,
        "drawing_bytes": forecast.drawing_bytes,
        "resident_bytes": forecast.resident_bytes,
        "parameters": sum(stage.parameters for stage in forecast.stages),
        "flops": sum(stage.flops for stage in forecast.stages),
        "replay_flops": sum(stage.replay_flops for stage in forecast.stages),
        "seconds": forecast.seconds,
        "disk": {
            "peak_bytes": forecast.disk.peak,
            "needed_bytes": forecast.disk.needed,
            "budget_bytes": forecast.disk.budget,
            "bytes_written": forecast.bytes_written,
            "plan": forecast.disk.explain(),
        },
        "baselines": dict(forecast.baselines),
    }


def _print(
    recipe: "Recipe", data: "DataFacts", machine: "Machine", forecast: "Forecast", unknown: str
) -> None:
    from greedy.memory.baselines import BASELINES  # noqa: PLC0415

    shape = sides(data.shape)
    click.echo(
        f"{recipe.name}: {data.rows['train']:,} training and {data.rows['test']:,} test images "
        f"of {shape}"
    )
    budget = (
        "any memory"
        if machine.memory_budget_bytes is None
        else f"{size(machine.memory_budget_bytes)} of memory"
    )
    click.echo(
        f"on {machine.device} in {machine.precision}, batches of {recipe.training.batch_size}, "
        f"a budget of {budget}"
        + (f" for each of {machine.processes} processes" if machine.processes > 1 else "")
    )
    timed = any(stage.seconds is not None for stage in forecast.stages)
    if machine.device == "cuda":
        click.echo("memory is what the allocator reserves; the driver's own context comes on top")
    print_table(
        ("stage", "name", "mode", "rows", "memory", "params", "time" if timed else "flop"),
        (
            (
                str(stage.stage),
                stage.name,
                stage.mode,
                str(stage.micro_batch),
                size(stage.peak_memory_bytes),
                count(stage.parameters),
                duration(stage.seconds) if timed else count(stage.flops),
            )
            for stage in forecast.stages
        ),
        text_columns=3,
    )
    for stage in forecast.stages:
        if stage.why_plain:
            click.echo(f"stage {stage.stage} has no mode but plain: {stage.why_plain}")
    _print_totals(machine, forecast, unknown)
    click.echo("one step of the whole network with the same batch would take:")
    print_table(
        ("by", "memory"),
        ((BASELINES[name], size(peak)) for name, peak in forecast.baselines.items()),
        text_columns=1,
    )


def _drawing(device: "DrawingDevice", forecast: "Forecast") -> str:
    """Says where new views are drawn."""
    if not any(stage.drawing_flops for stage in forecast.stages):
        return "no views are replaced, so --refresh-device is not used"
    taken = forecast.drawing_bytes
    if not taken:
        return "new views are drawn between the steps, since there is no memory for both at once"
    whose = "its memory" if device.apart else "memory besides"
    return f"new views are drawn on {device.name} beside the steps, in {size(taken)} of {whose}"


def _print_totals(machine: "Machine", forecast: "Forecast", unknown: str) -> None:
    click.echo(
        f"in all: {size(forecast.peak_memory_bytes)} of memory at most, "
        f"{count(sum(stage.parameters for stage in forecast.stages))} parameters, "
        f"{count(sum(stage.flops for stage in forecast.stages))} flop"
        + ("" if forecast.seconds is None else f", {duration(forecast.seconds)}")
    )
    if forecast.resident_bytes is not None:
        click.echo(
            f"that is tensors: the process takes about {size(forecast.resident_bytes)}, and stores "
            f"that it holds"
        )
    if machine.drawing is not None:
        click.echo(_drawing(machine.drawing, forecast))
    if forecast.seconds is None:
        click.echo(unknown)
    if replayed := sum(stage.replay_flops for stage in forecast.stages):
        click.echo(f"besides, frozen stages without a store are replayed: {count(replayed)} flop")
    if not forecast.disk.needed:
        click.echo("disk: every stage is trained, nothing more is written")
        return
    if any(stage.store_bytes for stage in forecast.stages):
        _print_stores(forecast.stages)
        drawn = forecast.drawing_share
        click.echo(
            f"in all: {size(forecast.bytes_written)} written into stores"
            + (f", {drawn:.1%} of all operations draw views" if drawn else "")
        )
    for line in forecast.disk.explain():
        click.echo(line)


def _print_stores(stages: "Sequence[StageForecast]") -> None:
    """Prints a table of the stores. The share of drawing is of the stage that trains, not of the
    one whose views are drawn."""
    print_table(
        ("stage", "views", "reuse", "store", "written", "drawing"),
        (
            (
                str(stage.stage),
                "-" if stage is stages[-1] else str(stage.views),  # the output layer
                str(stage.reuse) if stage.store_bytes else "-",
                size(stage.store_bytes or None),
                size(stage.bytes_written or None),
                f"{stage.drawing_share:.1%}" if stage.drawing_share else "-",
            )
            for stage in stages
        ),
        text_columns=1,
    )
