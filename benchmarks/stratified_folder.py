"""A smaller image folder: the first images of every class of its training split, and its whole
test split. `python benchmarks/stratified_folder.py cifar10-jpeg cifar10-10000 --per-class 1000`"""

import shutil
from pathlib import Path

import click


@click.command()
@click.argument("source", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.argument("to", type=click.Path(path_type=Path, exists=False))
@click.option("--per-class", default=1000, show_default=True, help="Training images of a class.")
def main(source: Path, to: Path, per_class: int) -> None:
    """Copy a part of an image folder."""
    for folder in sorted((source / "train").iterdir()):
        (to / "train" / folder.name).mkdir(parents=True)
        for image in sorted(folder.iterdir())[:per_class]:
            shutil.copy(image, to / "train" / folder.name)
    shutil.copytree(source / "test", to / "test")


if __name__ == "__main__":
    main()
