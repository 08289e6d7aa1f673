"""``greedy report``: one HTML page about runs."""

from pathlib import Path

import click

from greedy.base.sizes import size
from greedy.cli import options
from greedy.cli.tables import say, waiting


@click.command(epilog="Example: greedy report runs/pred runs/predsim --to report.html")
@click.argument("runs", nargs=-1, required=True, metavar="RUN...", type=options.PATH)
@click.option(
    "--to",
    default=Path("report.html"),
    show_default=True,
    metavar="FILE",
    type=options.PATH,
    help="The page to write.",
)
@click.option("--force", is_flag=True, help="Overwrite FILE if it exists.")
@options.device
@options.model
@options.debug
def report(runs: tuple[Path, ...], to: Path, force: bool, device: str, model: str | None) -> None:
    """Write one page about runs, side by side, that needs only a browser.

    It shows errors by stage and over epochs, disk, time, and memory next to that of other ways of
    training; the similarity matrices of a test batch, the confusion matrix and the most confidently
    wrong images; the recipe and the commands that repeat the run. Of an unfinished run it shows
    what there is so far. Finished networks classify their test images on --device.
    """
    from greedy.build.modules import load_network  # noqa: PLC0415
    from greedy.recipes.networks import needs_code  # noqa: PLC0415
    from greedy.report import require_report, write_report  # noqa: PLC0415
    from greedy.runs.directory import RunDirectory  # noqa: PLC0415

    require_report(to, force)
    directories = [RunDirectory.open(run) for run in runs]
    recipes = [directory.recipe for directory in directories]
    of_code = next((each for each in recipes if needs_code(each.model.network)), recipes[0])
    network = load_network(of_code, model)
    with waiting("classifying test images and drawing"):
        write_report(directories, to, device=device, model=network, overwrite=force)
    say(f"wrote {to} ({size(to.stat().st_size)})")
