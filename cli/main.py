"""The command ``greedy``."""

import click

from greedy.cli import options
from greedy.cli.bench import bench
from greedy.cli.cache import cache
from greedy.cli.data import data
from greedy.cli.failures import Group
from greedy.cli.finetune import finetune
from greedy.cli.plan import plan
from greedy.cli.plot import plot
from greedy.cli.recipes import recipes
from greedy.cli.report import report
from greedy.cli.reproduce import reproduce
from greedy.cli.results import evaluate, export, status
from greedy.cli.train import train, train_stage


@click.group(
    "greedy",
    cls=Group,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Example: greedy train --recipe demo",
)
@click.version_option(package_name="greedy")
@options.debug
def cli() -> None:
    """Train deep classifiers one layer at a time, from disk."""


COMMANDS = (
    train,
    train_stage,
    finetune,
    plan,
    bench,
    status,
    evaluate,
    export,
    plot,
    report,
    reproduce,
    recipes,
    data,
    cache,
)
for command in COMMANDS:
    cli.add_command(command)


def main() -> None:
    """Runs the command line of this process."""
    cli(prog_name="greedy")


if __name__ == "__main__":
    main()
