"""``greedy data``: the data sets known by name."""

from dataclasses import asdict
from pathlib import Path

import click

from greedy.base.text import sides
from greedy.cli import options
from greedy.cli.failures import Group
from greedy.cli.tables import print_json, print_table, say


@click.group(cls=Group, epilog="Example: greedy data list")
def data() -> None:
    """List the data sets and prepare one."""


@data.command("list", epilog="Example: greedy data list --data-dir ~/datasets")
@options.data_dir
@options.as_json
@options.debug
def list_data(data_dir: Path | None, as_json: bool) -> None:
    """List the data sets and whether they are on this machine."""
    from greedy.data import DATASETS, is_available  # noqa: PLC0415

    available = {entry.name: is_available(entry.name, data_dir) for entry in DATASETS}
    if as_json:
        print_json([asdict(entry) | {"available": available[entry.name]} for entry in DATASETS])
        return
    print_table(
        ("name", "here", "image", "classes", "train", "test"),
        (
            (
                entry.name,
                "yes" if available[entry.name] else "no",
                sides(entry.shape),
                str(entry.classes),
                f"{entry.train:,}",
                f"{entry.test:,}",
            )
            for entry in DATASETS
        ),
        text_columns=2,
    )
    say("Also folder:PATH, with images in PATH/CLASS, and module:function.")


@data.command(epilog="Example: greedy data prepare cifar10 --download")
@click.argument("name")
@options.data_dir
@options.download
@click.option(
    "--image-size",
    type=click.IntRange(min=1),
    metavar="N",
    help="Pixels to which a folder's images are resized and cropped, if they are of several sizes.",
)
@options.as_json
@options.debug
def prepare(
    name: str, data_dir: Path | None, download: bool, image_size: int | None, as_json: bool
) -> None:
    """Check that a data set is on this machine, or fetch it with --download. Every file of an image
    folder is decoded; those that cannot be decoded are named."""
    from greedy.cli.progress import preparing  # noqa: PLC0415
    from greedy.data import check_files, load_dataset  # noqa: PLC0415

    dataset = load_dataset(name, data_dir, download, image_size, allow_function=True)
    with preparing() as reporter:
        dataset = check_files(dataset, progress=reporter.files_checked)
    train, test = dataset.train, dataset.test
    if as_json:
        document = {"name": name, "shape": train.shape, "train": len(train), "test": len(test)}
        print_json(document | ({"notes": list(dataset.notes)} if dataset.notes else {}))
        return
    for note in dataset.notes:
        say(note)
    say(
        f"{name} is ready: {len(train):,} training and {len(test):,} test images "
        f"of {sides(train.shape)}"
    )
