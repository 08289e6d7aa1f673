"""Options that several commands share."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from greedy.cli.failures import DEBUG
from greedy.cli.fields import DATA, MACHINE, Option

F = TypeVar("F", bound=Callable[..., Any])

PATH = click.Path(path_type=Path)

recipe = click.option(
    "--recipe",
    "recipe_name",
    metavar="R",
    help="A name from `greedy recipes list`, or a TOML file.",
)
run_or_new = click.option(
    "--run",
    metavar="DIR",
    type=PATH,
    help="The run directory  [default: runs/R]; without --recipe, the run in it is resumed.",
)
run = click.option("--run", required=True, metavar="DIR", type=PATH, help="The run directory.")
device = click.option(
    "--device",
    cls=Option,
    group=MACHINE,
    metavar="auto|cpu|cuda|mps",
    default="auto",
    show_default=True,
    help="The device to compute on.",
)
refresh_device = click.option(
    "--refresh-device",
    cls=Option,
    group=MACHINE,
    metavar="cpu|cuda:N|mps",
    help="The device that draws new views of a store beside the training from it  [default: "
    "--device, between steps].",
)
model = click.option(
    "--model",
    metavar="MODULE:FUNCTION",
    help="The function that returns the network, for runs whose network a function returned.",
)
network = click.option(
    "--model",
    metavar="NAME",
    help="The network: a name from the recipes, torchvision:NAME, timm:NAME, or MODULE:FUNCTION, "
    "which returns it; a function is only called if it is named here  [model.network].",
)
images = click.option(
    "--images",
    cls=Option,
    group=DATA,
    nargs=2,
    metavar="TRAIN TEST",
    type=click.IntRange(min=1),
    help="The numbers of images of a folder that is not here; with --classes.",
)
classes = click.option(
    "--classes",
    cls=Option,
    group=DATA,
    metavar="N",
    type=click.IntRange(min=2),
    help="The number of classes of a folder that is not here; with --images.",
)
data_function = click.option(
    "--data",
    metavar="MODULE:FUNCTION",
    help="The function that returns the data sets, for runs that read them again in every pass.",
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
    help="The most memory to use on the device  [default: memory.budget of the run's recipe].",
)
log = click.option(
    "--log",
    metavar="tensorboard",
    type=click.Choice(["tensorboard"]),
    help="Also write curves, images and the recipe into the run's logs/, for TensorBoard.",
)
data_dir = click.option(
    "--data-dir",
    cls=Option,
    group=DATA,
    metavar="DIR",
    type=PATH,
    help="The directory of the data sets  [default: the user's cache directory].",
)
download = click.option(
    "--download",
    cls=Option,
    group=DATA,
    is_flag=True,
    help="Fetch the data set if it is missing.",
)
ignore_changes = click.option(
    "--ignore-changes",
    is_flag=True,
    help="Use the images that the run has stored, although the data have changed since.",
)
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
