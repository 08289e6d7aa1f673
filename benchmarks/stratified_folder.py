"""Copies part of an image folder: the first training images of every class, and the first or all of
its test images.

    python benchmarks/stratified_folder.py cifar10-jpeg cifar10-10000 --per-class 1000
"""

import shutil
from pathlib import Path

import click


@click.command()
@click.argument("source", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.argument("to", type=click.Path(path_type=Path, exists=False))
@click.option("--per-class", default=1000, show_default=True, help="Training images of a class.")
@click.option("--test-per-class", type=int, help="Test images of a class  [default: all].")
def main(source: Path, to: Path, per_class: int, test_per_class: int | None) -> None:
    """Copy a part of an image folder."""
    for split, count in (("train", per_class), ("test", test_per_class)):
        for folder in sorted((source / split).iterdir()):
            (to / split / folder.name).mkdir(parents=True)
            for image in sorted(folder.iterdir())[:count]:
                shutil.copy(image, to / split / folder.name)


if __name__ == "__main__":
    main()
