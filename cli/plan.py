"""``greedy plan``: what a run will take, before anything runs."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Console

from greedy.cli import fields, options
from greedy.cli.tables import count, duration, print_json, print_table, size
from greedy.cli.train import recipe_and_run

if TYPE_CHECKING:
    from greedy.forecasts.forecast import DataFacts, Forecast, Machine
    from greedy.recipes import Recipe

UNLIKE = (
    "times are unknown where no stage like it was measured: `greedy bench` with the same recipe "
    "and settings does that"
)
NO_STAGES = "times are only known where stages are trained one at a time"


@click.command(
    cls=fields.Command,
    epilog="Example: greedy plan --recipe cifar10/vgg11b-3x-predsim --memory-budget 768MiB",
)
@options.recipe
@options.run_or_new
@fields.settings
@options.device
@options.model
@options.as_json
@options.debug
def plan(
    recipe: str | None,
    run: Path | None,
    settings: tuple[str, ...],
    device: str,
    model: str | None,
    as_json: bool,
    **field_values: str | None,
) -> None:
    """Tell what a run will take of memory, disk, operations and time, a stage a line.

    Peaks of memory are counted on tensors without contents; neither data nor GPU are touched and
    nothing is written. A named data set need not be there, nor a GPU for --device cuda. Operations
    are those of the plain step over all epochs, a multiply-add counting 2. Times are known once
    `greedy bench` has measured this machine: of training a stage and writing its store.
    """
    from greedy.build.modules import load_network  # noqa: PLC0415
    from greedy.forecasts.calibration import Calibration, NotCalibrated  # noqa: PLC0415
    from greedy.forecasts.forecast import data_facts, forecast, machine  # noqa: PLC0415
    from greedy.runs.directory import RunDirectory  # noqa: PLC0415

    overrides = fields.overrides(settings, field_values)
    wanted, directory = recipe_and_run(recipe, run, overrides)
    network = load_network(wanted.model, model)
    if run is None and not _goes_on(directory, wanted):
        directory = directory.with_name(f"{directory.name}-planned")
    planned = RunDirectory.create(directory, wanted)
    data = data_facts(planned, fields.names_data(overrides))
    computer = machine(wanted, device)
    calibration, unknown = None, UNLIKE if wanted.training.strategy == "greedy" else NO_STAGES
    try:
        calibration = Calibration.load(computer.device)
    except NotCalibrated as reason:
        unknown = str(reason)
    with Console(stderr=True).status("counting the memory of every step"):
        found = forecast(planned, data, computer, network, calibration)
    if as_json:
        print_json(_document(wanted, computer, found))
    else:
        _print(wanted, data, computer, found, unknown)


def _goes_on(directory: Path, recipe: "Recipe") -> bool:
    """Whether a recipe would be trained in the run that is there: of another plan nobody asks."""
    from greedy.base.errors import UserError  # noqa: PLC0415
    from greedy.runs.directory import RunDirectory  # noqa: PLC0415

    try:
        RunDirectory.create(directory, recipe)
    except UserError:
        return False
    return True


def _document(recipe: "Recipe", machine: "Machine", found: "Forecast") -> dict[str, object]:
    return {
        "recipe": recipe.name,
        **asdict(machine),
        "batch_size": recipe.training.batch_size,
        "stages": [asdict(stage) for stage in found.stages],
        "peak_memory_bytes": found.peak_memory_bytes,
        "resident_bytes": found.resident_bytes,
        "parameters": sum(stage.parameters for stage in found.stages),
        "flops": sum(stage.flops for stage in found.stages),
        "replay_flops": sum(stage.replay_flops for stage in found.stages),
        "seconds": found.seconds,
        "disk": {
            "peak_bytes": found.disk.peak,
            "needed_bytes": found.disk.needed,
            "budget_bytes": found.disk.budget,
            "plan": found.disk.explain(),
        },
        "baselines": dict(found.baselines),
    }


def _print(
    recipe: "Recipe", data: "DataFacts", machine: "Machine", found: "Forecast", unknown: str
) -> None:
    from greedy.memory.baselines import BASELINES  # noqa: PLC0415

    shape = "x".join(map(str, data.shape))
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
    )
    timed = any(each.seconds is not None for each in found.stages)
    if machine.device == "cuda":
        click.echo("memory is what the allocator reserves; the driver's own context comes on top")
    print_table(
        ("stage", "name", "mode", "rows", "memory", "params", "store", "time" if timed else "flop"),
        (
            (
                str(each.stage),
                each.name,
                each.mode,
                str(each.micro_batch),
                size(each.peak_memory_bytes),
                count(each.parameters),
                size(each.store_bytes or None),
                duration(each.seconds) if timed else count(each.flops),
            )
            for each in found.stages
        ),
        left=3,
    )
    for each in found.stages:
        if not each.usual:
            click.echo(
                f"stage {each.stage} is outside the usual pattern, so it has no mode but plain"
            )
    _print_totals(found, unknown)
    click.echo("one step of the whole network with the same batch would take:")
    print_table(
        ("by", "memory"),
        ((BASELINES[name], size(peak)) for name, peak in found.baselines.items()),
        left=1,
    )


def _print_totals(found: "Forecast", unknown: str) -> None:
    click.echo(
        f"in all: {size(found.peak_memory_bytes)} of memory at most, "
        f"{count(sum(each.parameters for each in found.stages))} parameters, "
        f"{count(sum(each.flops for each in found.stages))} flop"
        + ("" if found.seconds is None else f", {duration(found.seconds)}")
    )
    if found.resident_bytes is not None:
        click.echo(
            f"that is tensors: the process takes about {size(found.resident_bytes)}, and stores "
            f"that it holds"
        )
    if found.seconds is None:
        click.echo(unknown)
    if replayed := sum(each.replay_flops for each in found.stages):
        click.echo(f"besides, frozen stages without a store are replayed: {count(replayed)} flop")
    if not found.disk.needed:
        click.echo("disk: every stage is trained, nothing more is written")
        return
    for line in found.disk.explain():
        click.echo(line)
