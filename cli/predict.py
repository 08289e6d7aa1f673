"""``greedy predict``: the classes of image files."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from greedy.base.sizes import percent
from greedy.cli import options
from greedy.cli.tables import print_json, print_table, say

if TYPE_CHECKING:
    from greedy.results.prediction import Prediction


@click.command(epilog="Example: greedy predict --run runs/demo shoe.png bag.jpg")
@options.run
@click.argument("images", metavar="IMAGE...", nargs=-1, required=True, type=options.PATH)
@options.until_stage
@click.option(
    "--top",
    metavar="K",
    type=int,
    default=3,
    show_default=True,
    help="Show K classes, the most likely.",
)
@options.memory_budget
@options.device
@options.model
@options.as_json
@options.debug
def predict(
    run: Path,
    images: tuple[Path, ...],
    until_stage: int | None,
    top: int,
    memory_budget: str | None,
    device: str,
    model: str | None,
    as_json: bool,
) -> None:
    """Classify image files with the trained network.

    Images are converted to the channels of the training images, resized to cover their size, and
    cropped at the centre. Exit code 1 if one could not be read.
    """
    from greedy.base.devices import pick_device  # noqa: PLC0415
    from greedy.base.sizes import parse_size  # noqa: PLC0415
    from greedy.build.modules import build_loss, load_network  # noqa: PLC0415
    from greedy.results.prediction import Prediction, Unreadable, predict  # noqa: PLC0415
    from greedy.runs.directory import RunDirectory  # noqa: PLC0415
    from greedy.runs.network import assemble  # noqa: PLC0415

    directory = RunDirectory.open(run)
    recipe = directory.recipe
    network = load_network(recipe, model)
    loss = None if until_stage is None else build_loss(recipe.loss)
    budget = parse_size(memory_budget) if memory_budget else None
    assembled = assemble(directory, loss, network, until_stage=until_stage)
    results = list(predict(directory, assembled, images, pick_device(device), top, budget))
    predictions = [result for result in results if isinstance(result, Prediction)]
    unreadable = [result for result in results if isinstance(result, Unreadable)]
    if as_json:
        failures = [{"image": str(result.image), "error": result.error} for result in unreadable]
        print_json({"predictions": [*map(_document, predictions)], "unreadable": failures})
    elif predictions:
        lines = (line for prediction in predictions for line in _lines(prediction))
        print_table(("image", "class", "confidence"), lines, text_columns=2)
    for failure in unreadable:
        say(f"Error: {failure.error}", err=True)
    if unreadable:
        raise SystemExit(1)


def _document(prediction: "Prediction") -> dict[str, object]:
    ranked = zip(prediction.classes, prediction.confidences, strict=True)
    classes = [{"class": name, "confidence": confidence} for name, confidence in ranked]
    return {"image": str(prediction.image), "classes": classes}


def _lines(prediction: "Prediction") -> Iterator[tuple[str, str, str]]:
    """Yields a line for each class, with the image's name in the first."""
    image = str(prediction.image)
    for name, confidence in zip(prediction.classes, prediction.confidences, strict=True):
        yield image, name, percent(100 * confidence)
        image = ""
