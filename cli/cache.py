"""``greedy cache``: info, verify, repair and drop of activation stores."""

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from greedy.base.commands import command
from greedy.base.errors import UserError
from greedy.base.sizes import size
from greedy.base.text import sides
from greedy.cli import options
from greedy.cli.failures import Group, terminable
from greedy.cli.results import print_changes, print_stores
from greedy.cli.tables import print_json, print_table, say

if TYPE_CHECKING:
    from collections.abc import Iterable

    from greedy.cache import Damage, StoreInfo
    from greedy.runs.directory import RunDirectory
    from greedy.runs.status import StoreStatus

STORE = "activations.zarr"
BAR = 40  # columns of the widest bar of a histogram


@click.group(cls=Group, epilog="Example: greedy cache info runs/demo")
def cache() -> None:
    """Inspect, verify, repair and drop activation stores."""


@cache.command(epilog="Example: greedy cache info runs/demo/stage2")
@click.argument("path", type=options.PATH)
@options.as_json
@options.debug
def info(path: Path, as_json: bool) -> None:
    """Show the size, the values and the views of the stores of a run or a stage.

    Figures about values are from a sample of the training rows. REUSE is the number of epochs after
    which a store's oldest view is replaced, 0 for never; HELD are the numbers of the views that it
    has now, WRITTEN all bytes ever written into it.
    """
    from greedy.cache import StoreError, store_info  # noqa: PLC0415
    from greedy.runs.status import store_status  # noqa: PLC0415

    run, numbers = _run_and_stages(path)

    def describe_stage(number: int) -> "tuple[StoreInfo, StoreStatus] | None":
        record = run.record(number)
        if record is None or not run.store_path(number).is_dir():
            return None
        status = store_status(record, has_store=True)
        try:
            return (store_info(run.open_store(number, "train")), status) if status else None
        except StoreError as error:
            found = command("cache", "verify", run.path)
            raise UserError(f"{error} ({found} says what can be done)") from error

    infos = {
        number: info
        for number in numbers
        if (info := run.read_consistently(partial(describe_stage, number), number)) is not None
    }
    if as_json:
        stores = [
            {"stage": n, **asdict(info), **asdict(status)} for n, (info, status) in infos.items()
        ]
        print_json({"stores": stores})
        return
    print_table(
        ("stage", "row", "encoding", "size", "B/value", "range", "zeros", "< 0"),
        (_line(number, info) for number, (info, _) in infos.items()),
        text_columns=1,
    )
    print_stores((number, status) for number, (_, status) in infos.items())
    if len(infos) == 1:
        _print_histogram(*(info for info, _ in infos.values()))


@cache.command(epilog="Example: greedy cache verify runs/demo")
@click.argument("path", type=options.PATH)
@options.as_json
@options.debug
def verify(path: Path, as_json: bool) -> None:
    """Check every file of a run or a stage: exit code 1 if any is damaged."""
    from greedy.runs.integrity import verify_run, verify_stage  # noqa: PLC0415

    if (path / "run.toml").exists():
        damages = verify_run(path)
    else:
        run, numbers = _run_and_stages(path)
        damages = [damage for number in numbers for damage in verify_stage(run, number)]
    if as_json:
        print_json({"damaged": [{"path": str(d.path), "what": d.problem} for d in damages]})
    else:
        for damage in damages:
            say(f"{damage.path}: {damage.problem}")
        summary = f"{len(damages)} damaged{_remedies(path, damages)}"
        say(summary if damages else "everything is as it was written")
    if damages:
        raise SystemExit(1)


def _remedies(path: Path, damages: "Iterable[Damage]") -> str:
    """Returns what can be done about damaged stores, to follow their number."""
    from greedy.cache.urls import LOCATION  # noqa: PLC0415

    names = [damage.path.parts for damage in damages]
    stages = {parts[parts.index(STORE) - 1] for parts in names if STORE in parts}
    found = ""
    if "stage0" in stages:
        found += "; images cannot be computed again: begin another run from the data"
    unknown = {damage.path.parents[2] for damage in damages if damage.path.name == LOCATION}
    unknown = {stage for stage in unknown if stage.name != "stage0"}
    for stage in sorted(unknown):
        drop, repair = command("cache", "drop", stage), command("cache", "repair", stage)
        found += f"; {drop} and then {repair} write a store again whose place is unknown"
    if stages - {"stage0"} - {stage.name for stage in unknown}:
        found += f"; {command('cache', 'repair', path)} computes damaged parts of stores again"
    return found


@cache.command(epilog="Example: greedy cache repair runs/demo")
@click.argument("path", type=options.PATH)
@options.device
@options.model
@options.data_function
@options.debug
def repair(path: Path, device: str, model: str | None, data: str | None) -> None:
    """Compute the damaged chunks in the stores of a run or a stage again.

    Where the store or the images that they were computed from are still there, damaged chunks get
    the same bytes again, and the others stay. Otherwise whole views are computed again and
    their content changes. Given the directory of one stage, a store that was dropped is written
    too. Exit code 1 if any damage is left.
    """
    from greedy.build.modules import load_network  # noqa: PLC0415
    from greedy.cli.progress import Lines  # noqa: PLC0415
    from greedy.cli.train import give_data  # noqa: PLC0415
    from greedy.trainer import GreedyTrainer  # noqa: PLC0415

    run, numbers = _run_and_stages(path)
    network = load_network(run.recipe, model)
    trainer = GreedyTrainer.from_recipe(run.recipe, run.path, device=device, model=network)
    trainer.reporter = Lines()
    give_data(trainer, data)
    print_changes(run)
    with terminable():
        repairs, remaining = trainer.repair(numbers, dropped=len(numbers) == 1)
    for done in repairs:
        outcome = "as before" if done.identical else "from another source: its content changed"
        say(f"stage {done.stage}, {done.split}: {_counted(done.chunks)} computed again, {outcome}")
    for damage in remaining:
        say(f"{damage.path}: {damage.problem}")
    if remaining:
        raise SystemExit(1)
    if not repairs:
        say("nothing is damaged")


def _counted(chunks: int) -> str:
    return "1 chunk" if chunks == 1 else f"{chunks} chunks"


@cache.command(epilog="Example: greedy cache drop runs/demo/stage2")
@click.argument("path", type=options.PATH)
@click.option(
    "--force", is_flag=True, help="Also delete a store that an interrupted training needs."
)
@options.debug
def drop(path: Path, force: bool) -> None:
    """Delete the stores of a run or a stage. Weights and records stay."""
    from greedy.base.sizes import format_size  # noqa: PLC0415
    from greedy.runs.state import RunState  # noqa: PLC0415
    from greedy.runs.unfinished import require_store_unneeded  # noqa: PLC0415

    run, numbers = _run_and_stages(path)
    if numbers == [0]:
        raise UserError(
            "stage 0 holds the images, which cannot be computed again: name another stage"
        )
    with run.write_lock():
        state = RunState.read(run)
        records = {number: state.record(number) for number in filter(None, numbers)}
        stored = [n for n, record in records.items() if record and state.has_store(n)]
        for number in stored if not force else ():
            require_store_unneeded(run, number)
        for number, record in records.items():
            if record and record.store and state.has_store(number):
                run.drop_stores(number)
                freed = format_size(record.store.bytes)
                say(f"stage {number}: {freed} freed; {_consequences(run, number)}")


def _consequences(run: "RunDirectory", number: int) -> str:
    """Says what later stages train from without this store, and how to write it again."""
    source = next(n for n in range(number - 1, -1, -1) if run.store_path(n).is_dir())
    replayed = f"stage {number}" if source == number - 1 else f"stages {source + 1} to {number}"
    return (
        f"later stages train from stage {source}'s store with {replayed} replayed, and "
        f"{command('cache', 'repair', run.stage_dir(number))} writes it again"
    )


def _run_and_stages(path: Path) -> tuple["RunDirectory", list[int]]:
    """Returns the run of a run or stage directory, and the numbers of the stages that it means."""
    from greedy.runs.directory import RunDirectory, run_of_stage  # noqa: PLC0415
    from greedy.runs.state import RunState  # noqa: PLC0415

    if path.name.startswith("stage") and not (path / "run.toml").exists():
        run, number = run_of_stage(path)
        return run, [number]
    run = RunDirectory.open(path)
    data = RunState.read(run).complete_record(0)
    return run, list(range(len(data.network) + 1))


def _line(number: int, info: "StoreInfo") -> tuple[str, ...]:
    return (
        str(number),
        sides(info.row_shape),
        f"{info.encoding} {info.compressor}",
        size(info.disk_bytes),
        f"{info.bytes_per_value:.2f}",
        f"{info.minimum:.1g}..{info.maximum:.2g}",
        f"{info.zeros:.1%}",
        f"{info.negatives:.1%}",
    )


def _print_histogram(info: "StoreInfo") -> None:
    largest = max(info.histogram)
    for share, edge in zip(info.histogram, info.edges, strict=False):
        say(f"{edge:10.3g} {'#' * round(BAR * share / largest)}")
