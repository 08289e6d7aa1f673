"""``greedy reproduce``: the paper's experiments, our test errors next to the published ones."""

import sys
from collections.abc import Iterable, Sequence
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from greedy.base.sizes import percent
from greedy.cli import fields, options
from greedy.cli.failures import failure_of, terminable
from greedy.cli.tables import print_json, print_table, say

if TYPE_CHECKING:
    from greedy.results.reproduction import Row

Failures = dict[Path, str]  # messages by the run directory


@click.command(
    cls=fields.Command, epilog="Example: greedy reproduce 5 --epochs-scale 0.1 --seeds 3"
)
@click.argument("names", metavar="TABLE|RECIPE...", nargs=-1, required=True)
@click.option(
    "--epochs-scale",
    metavar="X",
    type=float,
    default=1.0,
    show_default=True,
    help="Multiply the epochs of all rows, and their milestones.",
)
@click.option(
    "--seeds",
    metavar="N",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Train every row with N seeds: --seed and those after it.",
)
@click.option(
    "--to",
    metavar="DIR",
    type=options.PATH,
    default=Path("runs/reproduce"),
    show_default=True,
    help="The directory of the runs.",
)
@fields.settings
@options.data_dir
@options.download
@options.device
@options.as_json
@options.debug
def reproduce(
    names: tuple[str, ...],
    epochs_scale: float,
    seeds: int,
    to: Path,
    settings: tuple[str, ...],
    data_dir: Path | None,
    download: bool,
    device: str,
    as_json: bool,
    **field_values: str | None,
) -> None:
    """Train the paper's experiments and compare the test errors.

    TABLE is the number of one of the paper's tables; RECIPE is a name, a TOML file, or a pattern
    such as 'fashion-mnist/mlp-*'. Settings hold for all rows; training.strategy only for those with
    a local loss, since glob and glob+sim are strategies themselves.

    The same command skips finished runs and resumes the others. Once a run is evaluated, its
    activation stores are deleted; images, weights and records stay.
    """
    from greedy.base.devices import pick_device  # noqa: PLC0415
    from greedy.results.reproduction import rows  # noqa: PLC0415

    overrides = fields.overrides(settings, field_values)
    table = rows(names, overrides, epochs_scale=epochs_scale, seeds=seeds, to=to)
    run_options = {"data_dir": data_dir, "download": download, "device": pick_device(device).type}
    run_options["allow_function"] = fields.names_data(overrides)
    failures: Failures = {}
    try:
        with terminable(), redirect_stdout(sys.stderr) if as_json else nullcontext():
            _finish(table, failures, run_options)
    finally:
        if as_json:
            print_json({"rows": [_document(row, failures) for row in table]})
        else:
            _print(table, failures)
    if failures:
        raise SystemExit(1)


def _finish(table: Sequence["Row"], failures: Failures, run_options: dict[str, Any]) -> None:
    """Finishes all runs, one after the other; a failure ends only its run."""
    from greedy.cli.dashboard import reporter  # noqa: PLC0415

    for number, row in enumerate(table, start=1):
        for run in row.runs:
            title = f"row {number}/{len(table)}, {row.name}, seed {run.recipe.seed}"
            if run.error_percent is None:
                say(f"{title}: {run.path}")
            try:
                run.finish(**run_options, reporter=reporter)
            except Exception as error:
                failures[run.path] = failure_of(error).message
                say(f"{title}: {failures[run.path]}")


def _print(table: Sequence["Row"], failures: Failures) -> None:
    say("test errors in percent; ours: mean over seeds, range: largest less smallest")
    print_table(
        ("recipe", "network", "loss", "paper", "ours", "range", "seeds"),
        map(_line, table),
        text_columns=3,
    )
    for note in (*_cited(table), *_departures(table), *_unfinished(table, failures)):
        say(note)


def _line(row: "Row") -> tuple[str, ...]:
    from greedy.recipes import summary  # noqa: PLC0415

    summarised, errors = summary(row.recipe), row.errors_percent
    seed_range = max(errors) - min(errors) if len(errors) > 1 else None
    return (
        row.name,
        summarised["network"],
        summarised["loss"],
        *map(_bare_percent, (summarised["paper_test_error_percent"], row.mean, seed_range)),
        f"{len(errors)}/{len(row.runs)}",
    )


def _bare_percent(value: float | None) -> str:
    return percent(value).removesuffix(" %")


def _cited(table: Iterable["Row"]) -> Iterable[str]:
    """Yields the rows whose figure is another work's, one line for each work."""
    works: dict[str, list[str]] = {}
    for row in table:
        if row.recipe.paper and row.recipe.paper.cited:
            works.setdefault(row.recipe.paper.cited, []).append(row.name)
    for work, names in works.items():
        yield f"{', '.join(names)}: the paper cites this figure from {work}"


def _departures(table: Sequence["Row"]) -> Iterable[str]:
    """Yields what was not as published, one line for all rows with the same differences."""
    groups: dict[str, list[str]] = {}
    for row in table:
        if changed := _departures_of(row):
            groups.setdefault(", ".join(changed), []).append(row.name)
    for changes, names in groups.items():
        which = "all rows" if len(names) == len(table) else ", ".join(names)
        yield f"{which}: not as published in {changes}"
    if any(row.recipe.paper and row.recipe.training.strategy == "greedy" for row in table):
        yield "the paper trained local losses jointly, as --strategy joint does"


def _departures_of(row: "Row") -> list[str]:
    from greedy.recipes import departures  # noqa: PLC0415

    return departures(row.recipe) if row.recipe.paper else []


def _unfinished(table: Iterable["Row"], failures: Failures) -> Iterable[str]:
    """Yields a line for each failure, and one that names all other unfinished rows."""
    waiting = []
    for row in table:
        seeds: dict[str | None, list[int]] = {}
        for run in row.runs:
            if run.error_percent is None:
                seeds.setdefault(failures.get(run.path), []).append(run.recipe.seed)
        if seeds.pop(None, []):
            waiting.append(row.name)
        for sentence, numbers in seeds.items():
            yield f"unfinished: {row.name}, seed {', '.join(map(str, numbers))}: {sentence}"
    if waiting:
        yield f"unfinished: {', '.join(waiting)}"


def _document(row: "Row", failures: Failures) -> dict[str, Any]:
    from greedy.recipes import summary  # noqa: PLC0415

    return {
        **summary(row.recipe),
        "name": row.name,
        "strategy": row.recipe.training.strategy,
        "test_error_percent": row.mean,
        "departures": _departures_of(row),
        "finished": row.finished,
        "runs": [
            {
                "seed": run.recipe.seed,
                "run": str(run.path),
                "test_error_percent": run.error_percent,
                "failure": failures.get(run.path),
            }
            for run in row.runs
        ],
    }
