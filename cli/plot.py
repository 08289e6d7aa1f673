"""``greedy plot``: error curves of runs, and similarity matrices of a run's stages."""

from pathlib import Path

import click

from greedy.base.errors import UserError
from greedy.base.sizes import size
from greedy.cli import options
from greedy.cli.tables import say


@click.command(epilog="Example: greedy plot runs/pred runs/predsim --to curves.svg")
@click.argument("runs", nargs=-1, required=True, metavar="RUN...", type=options.PATH)
@click.option(
    "--to",
    required=True,
    metavar="FILE",
    type=options.PATH,
    help="The picture to write, its format by its suffix: .svg, .png or .pdf.",
)
@click.option(
    "--similarity",
    is_flag=True,
    help="Draw the similarity matrices of one run instead.",
)
@click.option("--force", is_flag=True, help="Overwrite FILE if it exists.")
@options.model
@options.debug
def plot(
    runs: tuple[Path, ...], to: Path, similarity: bool, force: bool, model: str | None
) -> None:
    """Draw errors over epochs, or the similarity matrices of a run's stages.

    Training and test errors: for one run those of its stages, for several those of their networks,
    in one picture. With --similarity: the similarity matrix of a batch of test images after each
    stage of one run, and the target of the similarity loss.
    """
    from greedy.build.modules import load_network  # noqa: PLC0415
    from greedy.results.curves import run_curves, run_names, stage_curves  # noqa: PLC0415
    from greedy.results.figures import curves_figure, require_picture, save, similarity_figure  # noqa: PLC0415
    from greedy.results.similarity import similarity_by_stage  # noqa: PLC0415
    from greedy.runs.directory import RunDirectory  # noqa: PLC0415

    require_picture(to, force)
    directories = [RunDirectory.open(run) for run in runs]
    first, *others = directories
    name = run_names([first])[0]
    if similarity and others:
        raise UserError(f"--similarity draws one run, not {len(runs)}: call it once for each")
    if similarity:
        network = load_network(first.recipe, model)
        figure = similarity_figure(similarity_by_stage(first, model=network), name)
    elif others:
        figure = curves_figure(run_curves(directories))
    else:
        figure = curves_figure(stage_curves(first), name, by_depth=True)
    save(figure, to, overwrite=force)
    say(f"wrote {to} ({size(to.stat().st_size)})")
