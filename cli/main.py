"""``greedy``, the group of all commands."""

import click

from greedy.cli import options
from greedy.cli.bench import bench
from greedy.cli.cache import cache
from greedy.cli.data import data
from greedy.cli.doctor import doctor
from greedy.cli.failures import Group
from greedy.cli.finetune import finetune
from greedy.cli.plan import plan
from greedy.cli.plot import plot
from greedy.cli.predict import predict
from greedy.cli.recipes import recipes
from greedy.cli.report import report
from greedy.cli.reproduce import reproduce
from greedy.cli.results import evaluate, export, status
from greedy.cli.train import train, train_stage

EPILOG = """Example: greedy train --recipe demo

\b
The shell completes commands and options with one of these lines in ~/.bashrc,
~/.zshrc or ~/.config/fish/config.fish:
  eval "$(_GREEDY_COMPLETE=bash_source greedy)"
  eval "$(_GREEDY_COMPLETE=zsh_source greedy)"
  _GREEDY_COMPLETE=fish_source greedy | source
"""


@click.group(
    "greedy",
    cls=Group,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=EPILOG,
)
@click.version_option(package_name="greedy-train")
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
    predict,
    export,
    plot,
    report,
    reproduce,
    recipes,
    data,
    cache,
    doctor,
)
for command in COMMANDS:
    cli.add_command(command)


def main() -> None:
    """Runs the command line of this process."""
    cli(prog_name="greedy")


if __name__ == "__main__":
    main()
