"""Options that several commands share."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click

from greedy.cli.failures import DEBUG

F = TypeVar("F", bound=Callable[..., Any])

SHORTHANDS = {
    "data": "data.name",
    "seed": "seed",
    "stage_layers": "model.stage_layers",
    "views": "store.views",
    "refresh_every": "store.refresh_every",
    "encoding": "store.encoding",
    "disk_budget": "store.disk_budget",
    "keep": "store.keep",
    "ram_budget": "store.ram_budget",
    "memory_budget": "memory.budget",
    "micro_batch": "memory.micro_batch",
    "optimizer_state": "memory.optimizer_state",
    "precision": "training.precision",
    "compile": "training.compile",
    "deterministic": "training.deterministic",
    "patience": "training.patience",
    "strategy": "training.strategy",
    "accumulate": "training.accumulate",
    "checkpoint_minutes": "training.checkpoint_minutes",
}

PATH = click.Path(path_type=Path)

recipe = click.option(
    "--recipe", metavar="R", help="A name from `greedy recipes list`, or a TOML file."
)
run_or_new = click.option(
    "--run",
    metavar="DIR",
    type=PATH,
    help="The run directory  [default: runs/R]; alone, the run there goes on.",
)
run = click.option("--run", required=True, metavar="DIR", type=PATH, help="The run directory.")
device = click.option(
    "--device",
    metavar="auto|cpu|cuda|mps",
    default="auto",
    show_default=True,
    help="Where to compute.",
)
model = click.option(
    "--model",
    metavar="MODULE:FUNCTION",
    help="The function that returns the network, for runs whose network was built in Python.",
)
until_stage = click.option(
    "--until-stage",
    type=int,
    metavar="N",
    help="Stop after stage N and use its local classifier: an early exit.",
)
memory_budget = click.option(
    "--memory-budget",
    metavar="SIZE",
    help="Most memory on the device  [default: as the run was trained].",
)
log = click.option(
    "--log",
    metavar="tensorboard",
    type=click.Choice(["tensorboard"]),
    help="Also write curves, images and the recipe into the run's logs/, for TensorBoard.",
)
data_dir = click.option(
    "--data-dir",
    metavar="DIR",
    type=PATH,
    help="Where data sets are kept  [default: the user's cache directory].",
)
download = click.option("--download", is_flag=True, help="Fetch the data set if it is missing.")
as_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")


def debug(command: F) -> F:
    """Adds --debug."""
    return click.option(
        "--debug",
        is_flag=True,
        is_eager=True,
        expose_value=False,
        callback=_keep_debug,
        help="Show a traceback when something fails.",
    )(command)


def _keep_debug(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    ctx.meta[DEBUG] = value or ctx.meta.get(DEBUG, False)


def settings(command: F) -> F:
    """Adds --set and its shorthands."""
    for option in (
        click.option(
            "--checkpoint-minutes",
            metavar="M",
            help="Shorthand of --set training.checkpoint_minutes=M.",
        ),
        click.option("--accumulate", metavar="M", help="Shorthand of --set training.accumulate=M."),
        click.option(
            "--strategy",
            metavar="NAME",
            help="Shorthand of --set training.strategy: greedy, joint, backprop or glob+sim.",
        ),
        click.option("--patience", metavar="N", help="Shorthand of --set training.patience=N."),
        click.option(
            "--deterministic",
            flag_value="true",
            help="Shorthand of --set training.deterministic=true.",
        ),
        click.option(
            "--compile", metavar="auto|on|off", help="Shorthand of --set training.compile."
        ),
        click.option("--precision", metavar="NAME", help="Shorthand of --set training.precision."),
        click.option("--ram-budget", metavar="SIZE", help="Shorthand of --set store.ram_budget."),
        click.option(
            "--optimizer-state", metavar="PLACE", help="Shorthand of --set memory.optimizer_state."
        ),
        click.option("--micro-batch", metavar="N", help="Shorthand of --set memory.micro_batch=N."),
        click.option("--memory-budget", metavar="SIZE", help="Shorthand of --set memory.budget."),
        click.option("--keep", metavar="NAME", help="Shorthand of --set store.keep."),
        click.option("--disk-budget", metavar="SIZE", help="Shorthand of --set store.disk_budget."),
        click.option("--encoding", metavar="NAME", help="Shorthand of --set store.encoding."),
        click.option(
            "--refresh-every", metavar="K", help="Shorthand of --set store.refresh_every=K."
        ),
        click.option("--views", metavar="N", help="Shorthand of --set store.views=N."),
        click.option(
            "--stage-layers", metavar="N", help="Shorthand of --set model.stage_layers=N."
        ),
        click.option("--seed", metavar="N", help="Shorthand of --set seed=N."),
        click.option("--data", metavar="NAME", help="Shorthand of --set data.name=NAME."),
        click.option(
            "--set",
            "settings",
            metavar="KEY=VALUE",
            multiple=True,
            help="Change a field of the recipe, e.g. training.epochs=10; can be repeated.",
        ),
    ):
        command = option(command)
    return command


def overrides(settings: Sequence[str], shorthands: Mapping[str, str | None]) -> list[str]:
    """All of them as --set would say it."""
    given = {SHORTHANDS[name]: value for name, value in shorthands.items() if value is not None}
    return [*settings, *(f"{key}={value}" for key, value in given.items())]


def names_data(overrides: Sequence[str]) -> bool:
    """Whether the data set was named on this command line."""
    return any(each.partition("=")[0].strip() == "data.name" for each in overrides)
