"""Commands that look after activation stores: info, verify, repair, drop."""

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from greedy.base.commands import command
from greedy.cli import options
from greedy.cli.failures import Group, terminable
from greedy.cli.results import tell_changes
from greedy.cli.tables import print_json, print_table, say, size

if TYPE_CHECKING:
    from greedy.cache import StoreInfo
    from greedy.runs.directory import RunDirectory

BAR = 40  # columns of the widest bar of a histogram


@click.group(cls=Group, epilog="Example: greedy cache info runs/demo")
def cache() -> None:
    """Look after activation stores: info, verify, repair, drop."""


@cache.command(epilog="Example: greedy cache info runs/demo/stage2")
@click.argument("path", type=options.PATH)
@options.as_json
@options.debug
def info(path: Path, as_json: bool) -> None:
    """Show what the stores of a run or a stage hold.

    Values are those of a sample of the training rows.
    """
    from greedy.cache import describe  # noqa: PLC0415

    run, numbers = _stages(path)

    def described(number: int) -> "StoreInfo | None":
        there = run.store_path(number).is_dir()
        return describe(run.open_store(number, "train")) if there else None

    looked_at = {n: run.read_consistently(partial(described, n), n) for n in numbers}
    found = {n: each for n, each in looked_at.items() if each is not None}
    if as_json:
        print_json({"stores": [{"stage": n, **asdict(each)} for n, each in found.items()]})
        return
    print_table(
        ("stage", "views", "row", "encoding", "size", "B/value", "range", "zeros", "< 0"),
        (_line(number, each) for number, each in found.items()),
        left=1,
    )
    if len(found) == 1:
        _print_histogram(*found.values())


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
        run, numbers = _stages(path)
        damages = [damage for number in numbers for damage in verify_stage(run, number)]
    if as_json:
        print_json({"damaged": [{"path": str(d.path), "what": d.what} for d in damages]})
    else:
        for damage in damages:
            say(f"{damage.path}: {damage.what}")
        way_out = f": {command('cache', 'repair', path)} computes anew what it can of stores"
        of_stores = any("activations.zarr" in damage.path.parts for damage in damages)
        found = f"{len(damages)} damaged{way_out if of_stores else ''}"
        say(found if damages else "everything is as it was written")
    if damages:
        raise SystemExit(1)


@cache.command(epilog="Example: greedy cache repair runs/demo")
@click.argument("path", type=options.PATH)
@options.device
@options.model
@options.debug
def repair(path: Path, device: str, model: str | None) -> None:
    """Compute anew what is damaged in the stores of a run or a stage.

    Only damaged chunks are written, and are what they were while what they were computed from
    is there. Otherwise their views are computed anew. Exit code 1 if any damage is left. The
    store of a stage that is named is also written if it was dropped.
    """
    from greedy.build.modules import load_network  # noqa: PLC0415
    from greedy.cli.progress import Lines  # noqa: PLC0415
    from greedy.trainer import GreedyTrainer  # noqa: PLC0415

    run, numbers = _stages(path)
    network = load_network(run.recipe.model, model)
    trainer = GreedyTrainer.from_recipe(run.recipe, run.path, device=device, model=network)
    trainer.reporter = Lines()
    tell_changes(run)
    with terminable():
        done, left = trainer.repair(numbers, dropped=len(numbers) == 1)
    for each in done:
        outcome = "as they were" if each.identical else "from another source: its content changed"
        say(f"stage {each.stage}, {each.split}: {_counted(each.chunks)} computed, {outcome}")
    for damage in left:
        say(f"{damage.path}: {damage.what}")
    if left:
        raise SystemExit(1)
    if not done:
        say("nothing is damaged")


def _counted(chunks: int) -> str:
    return "1 chunk" if chunks == 1 else f"{chunks} chunks"


@cache.command(epilog="Example: greedy cache drop runs/demo/stage2")
@click.argument("path", type=options.PATH)
@click.option(
    "--force", is_flag=True, help="Also the store that an interrupted training would go on from."
)
@options.debug
def drop(path: Path, force: bool) -> None:
    """Delete the stores of a run or a stage. Weights and records stay."""
    from greedy.base.errors import UserError  # noqa: PLC0415
    from greedy.base.sizes import format_size  # noqa: PLC0415
    from greedy.runs.unfinished import require_store_unneeded  # noqa: PLC0415

    run, numbers = _stages(path)
    if numbers == [0]:
        raise UserError("stage 0 holds the images that all else is computed from: drop another")
    with run.write_lock():
        records = {number: run.record(number) for number in filter(None, numbers)}
        there = [n for n, record in records.items() if record and run.store_path(n).is_dir()]
        for number in there if not force else ():
            require_store_unneeded(run, number)
        for number, record in records.items():
            if record and record.store and run.store_path(number).is_dir():
                run.drop_stores(number)
                freed = format_size(record.store.bytes)
                say(f"stage {number}: {freed} freed; {_rebuilding(run, number)}")


def _rebuilding(run: "RunDirectory", number: int) -> str:
    source = next(n for n in range(number - 1, -1, -1) if run.store_path(n).is_dir())
    replayed = f"stage {number}" if source == number - 1 else f"stages {source + 1} to {number}"
    return (
        f"what trains after it replays {replayed} from stage {source}'s store, and "
        f"{command('cache', 'repair', run.stage_dir(number))} writes it again"
    )


def _stages(path: Path) -> tuple["RunDirectory", list[int]]:
    """The run and the numbers of the stages that a run or stage directory stands for."""
    from greedy.runs.directory import RunDirectory, run_of_stage  # noqa: PLC0415

    if path.name.startswith("stage") and not (path / "run.toml").exists():
        run, number = run_of_stage(path)
        return run, [number]
    run = RunDirectory.open(path)
    data = run.complete_record(0)
    return run, list(range(len(data.network) + 1))


def _line(number: int, found: "StoreInfo") -> tuple[str, ...]:
    return (
        str(number),
        str(found.views),
        "x".join(map(str, found.row_shape)),
        f"{found.encoding} {found.compressor}",
        size(found.disk_bytes),
        f"{found.bytes_per_value:.2f}",
        f"{found.minimum:.1g}..{found.maximum:.2g}",
        f"{found.zeros:.1%}",
        f"{found.negatives:.1%}",
    )


def _print_histogram(found: "StoreInfo") -> None:
    most = max(found.histogram)
    for share, left in zip(found.histogram, found.edges, strict=False):
        say(f"{left:10.3g} {'#' * round(BAR * share / most)}")
