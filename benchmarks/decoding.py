"""The speed of reading an image folder, compared with Pillow alone.

The images are JPEG files of photographs' usual size, smooth noise of about 100 KB each, which are
resized and cropped as for ImageNet. The folder is read as stage 0 is written, on as many threads as
that takes. It is compared, on as many threads, with Pillow that only decodes the same files, and
with Pillow that also resizes, crops and copies them into a batch. Prints images a second and core,
and how many times as fast as each of them the folder is: medians of interleaved repetitions.
"""

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import click
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from greedy.data import load_dataset

WIDTH, HEIGHT = 500, 375
SIDE = 224
QUALITY = 90
BATCH = 64


def write_photos(folder: Path, count: int) -> None:
    """Writes images of two classes to train on, and one of each to test on."""
    random = np.random.default_rng(0)
    for number in range(count + 2):
        coarse = random.integers(0, 256, (HEIGHT // 6, WIDTH // 6, 3), dtype=np.uint8)
        image = Image.fromarray(coarse).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
        grain = random.normal(0, 8, (HEIGHT, WIDTH, 3))
        pixels = np.clip(np.asarray(image) + grain, 0, 255).astype(np.uint8)
        split = "train" if number < count else "test"
        path = folder / split / str(number % 2) / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path, quality=QUALITY)


def decode(file: Path, out: NDArray[Any]) -> None:
    """Decodes a file with Pillow."""
    with Image.open(file) as image:
        image.load()


def decode_and_fit(file: Path, out: NDArray[Any]) -> None:
    """Decodes a file with Pillow, resizes its short side, crops the centre, and copies that."""
    with Image.open(file) as image:
        scale = SIDE / min(image.size)
        size = [int(side * scale) for side in image.size]
        left, top = (round((side - SIDE) / 2) for side in size)
        resized = image.resize((size[0], size[1]), Image.Resampling.BILINEAR)
        cropped = resized.crop((left, top, left + SIDE, top + SIDE)).convert("RGB")
        out[:] = np.asarray(cropped).transpose(2, 0, 1)


def by_pillow(one: Callable[[Path, NDArray[Any]], None], files: Sequence[Path]) -> None:
    """Reads files in batches."""
    for start in range(0, len(files), BATCH):
        part = files[start : start + BATCH]
        images = np.empty((len(part), 3, SIDE, SIDE), np.uint8)
        with ThreadPoolExecutor() as pool:
            list(pool.map(one, part, images))


@click.command()
@click.option("--images", type=click.IntRange(min=1), default=256, show_default=True)
@click.option("--repetitions", type=click.IntRange(min=1), default=7, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
def main(images: int, repetitions: int, as_json: bool) -> None:
    """Compare reading an image folder with Pillow alone."""
    cores = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as place:
        write_photos(Path(place), images)
        split = load_dataset(f"folder:{place}", image_size=SIDE).train
        files = sorted(Path(place).glob("train/*/*"))

        def folder() -> None:
            for start in range(0, images, BATCH):
                split.read(np.arange(start, min(start + BATCH, images)))

        readers = {
            "folder": folder,
            "pillow_decoding": lambda: by_pillow(decode, files),
            "pillow": lambda: by_pillow(decode_and_fit, files),
        }
        seconds: dict[str, list[float]] = {name: [] for name in readers}
        for repetition in range(repetitions + 1):
            for name, read in readers.items():
                started = time.perf_counter()
                read()
                if repetition:  # the first warms up
                    seconds[name].append(time.perf_counter() - started)
    rates = {name: images / statistics.median(times) / cores for name, times in seconds.items()}
    ratios = {
        name: statistics.median(
            other / own for own, other in zip(seconds["folder"], seconds[name], strict=True)
        )
        for name in readers
        if name != "folder"
    }
    document = {
        "images_a_second_and_core": {name: round(rate, 1) for name, rate in rates.items()},
        "times_as_fast_as": {name: round(ratio, 3) for name, ratio in ratios.items()},
        "cores": cores,
    }
    if as_json:
        print(json.dumps(document))
    else:
        for key, value in document.items():
            print(f"{key}: {value}")


if __name__ == "__main__":
    main()
