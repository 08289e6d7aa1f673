"""Runs the pending experiments of docs/experiments.toml, one after the other, in a folder outside
the repository. The same command resumes where it stopped.

A command's `{placeholders}` take every combination of the lists in its entry. Each run is evaluated
by `greedy evaluate`, whose result is printed and saved next to the run.
"""

import itertools
import json
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

EXPERIMENTS = Path(__file__).parent.parent / "docs" / "experiments.toml"


def commands(experiment: dict[str, Any]) -> Iterator[list[str]]:
    """Yields the command for every combination of the lists."""
    lists = {k: v for k, v in experiment.items() if isinstance(v, list)}
    for values in itertools.product(*lists.values()):
        yield shlex.split(experiment["command"].format(**dict(zip(lists, values, strict=True))))


def evaluated(run: Path) -> dict[str, Any]:
    """Returns the result of `greedy evaluate` for a finished run, computed once."""
    result = run.with_suffix(".json")
    if not result.is_file():
        command = [*GREEDY, "evaluate", "--run", str(run), "--json"]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        result.write_text(output)
    return json.loads(result.read_text())


GREEDY = [sys.executable, "-m", "greedy.cli.main"]


@click.command()
@click.option("--to", type=click.Path(path_type=Path), required=True, help="Folder of the runs.")
@click.option("--only", multiple=True, help="Names of experiments  [default: all pending].")
@click.option("--dry-run", is_flag=True, help="Only print the commands.")
def main(to: Path, only: tuple[str, ...], dry_run: bool) -> None:
    """Run the pending experiments."""
    to.mkdir(parents=True, exist_ok=True)
    for experiment in tomllib.loads(EXPERIMENTS.read_text())["experiment"]:
        name = experiment["name"]
        if name not in only if only else experiment["state"] != "pending":
            continue
        for command in commands(experiment):
            click.echo(f"{name}: {shlex.join(command)}")
            if dry_run:
                continue
            run = to / command[command.index("--run") + 1]
            if not run.with_suffix(".json").is_file():
                subprocess.run([*GREEDY, *command[1:]], check=True, cwd=to)
            click.echo(f"{run.name}: {evaluated(run)['error_percent']:.2f} %")


if __name__ == "__main__":
    main()
