"""Classification of image files by a trained network."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from greedy.base.devices import full_float32
from greedy.base.errors import UserError
from greedy.data.images import MODES, Reading, open_image
from greedy.data.modes import KINDS
from greedy.memory.forward import fit_forward
from greedy.results.evaluation import budget_or_own, raw_to_float
from greedy.runs.directory import RunDirectory
from greedy.runs.record import StageRecord
from greedy.runs.state import RunState

BATCH = 32  # images at a time: fast enough, and little memory compared with the weights


@dataclass(frozen=True)
class Prediction:
    """The most likely classes of an image, in order, and the softmax of each, from 0 to 1."""

    image: Path
    classes: Sequence[str]
    confidences: Sequence[float]


@dataclass(frozen=True)
class Unreadable:
    """An image that could not be read, and the reason in one sentence."""

    image: Path
    error: str


def predict(
    run: RunDirectory,
    network: nn.Sequential,
    images: Sequence[Path],
    device: torch.device,
    top: int = 3,
    memory_budget: int | None = None,
) -> Iterator[Prediction | Unreadable]:
    """Classifies image files in float32 and evaluation mode. The network is neither changed nor
    moved.

    Images are read as those of an image folder: transparent parts show the recipe's background;
    they are converted to the channels of the run's images, resized to cover their size, and cropped
    at the centre.

    Args:
        network: from ``greedy.runs.network.assemble``, or one with the same input and output.
        images: the files.
        top: number of classes to return for each image.
        memory_budget: bytes to use on the device at most, by default those of the run's recipe.

    Yields:
        The result of each image, in the order of ``images``.

    Raises:
        UserError: one of ``images`` is a folder, ``top`` is not positive, the budget is too small,
            or the run was not trained on images in bytes.
    """
    data = RunState.read(run).complete_record(0)
    _require_images(run, data)
    if top < 1:
        raise UserError(f"{top} classes cannot be shown: ask for 1 or more")
    for path in images:
        if path.is_dir():
            raise UserError(f"{path} is a folder: name the images in it, such as {path}/*.png")
    budget = budget_or_own(run, device, memory_budget)
    forward = fit_forward(network, data.row_shape, budget, device.type)
    batch, reading = min(BATCH, forward.rows), Reading.of(run.recipe.data)

    def logits(x: np.ndarray) -> Tensor:
        return forward(raw_to_float(x, device))

    return (
        result
        for start in range(0, len(images), batch)
        for result in _predict_batch(data, reading, logits, images[start : start + batch], top)
    )


def _require_images(run: RunDirectory, data: StageRecord) -> None:
    channels = data.row_shape[0]
    if channels not in MODES:
        raise UserError(
            f"image files have 1 or 3 channels and the images of {run.path} {channels}: give "
            f"them to `greedy.runs.network.assemble`'s network in Python"
        )
    if (
        data.store is not None
        and data.store.encoding == "float32"
        and data.data_choices.pixels == "bytes"
    ):
        raise UserError(
            f"{run.path} was trained on floats, which cannot be made from an image file: give them "
            f"to `greedy.runs.network.assemble`'s network in Python"
        )


def _predict_batch(
    data: StageRecord,
    reading: Reading,
    logits: Callable[[np.ndarray], Tensor],
    images: Sequence[Path],
    top: int,
) -> Iterator[Prediction | Unreadable]:
    with ThreadPoolExecutor() as pool:
        rows = list(pool.map(lambda image: _read(image, data, reading), images))
    readable = [row for row in rows if isinstance(row, np.ndarray)]
    answers = iter(_best(logits, np.stack(readable), top) if readable else ())
    for image, row in zip(images, rows, strict=True):
        if isinstance(row, UserError):
            yield Unreadable(image, str(row))
        else:
            numbers, confidences = next(answers)
            yield Prediction(image, [data.class_names[n] for n in numbers], confidences)


@full_float32()
def _best(
    logits: Callable[[np.ndarray], Tensor], rows: np.ndarray, top: int
) -> list[tuple[list[int], list[float]]]:
    """Returns the numbers of the most likely classes of each row, and the confidence in each."""
    confidences = logits(rows).softmax(dim=1)
    best = confidences.topk(min(top, confidences.shape[1]))
    return list(zip(best.indices.tolist(), best.values.tolist(), strict=True))


def _read(file: Path, data: StageRecord, reading: Reading) -> np.ndarray | UserError:
    """Reads an image file as a row of the data set, (C, H, W) of bytes or float32, or returns the
    error."""
    channels, height, width = data.row_shape
    trained = data.data_choices.pixels
    try:
        with open_image(file, reading) as image:
            if image.kind != trained:
                raise UserError(
                    f"{file} holds {KINDS[image.kind]} and the network was trained on images of "
                    f"{KINDS[trained]}: convert the image"
                )
            return image.values(channels, reading.background, (height, width))
    except UserError as error:
        return error
