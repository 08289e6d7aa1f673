"""What a trained network takes images for."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from greedy.base.devices import full_float32
from greedy.base.errors import UserError
from greedy.data.images import MODES, Reading, opened
from greedy.data.modes import KINDS
from greedy.memory.choice import memory_budget as memory_budget_of
from greedy.memory.forward import fit_forward
from greedy.results.evaluation import raw_to_float
from greedy.runs.directory import RunDirectory
from greedy.runs.record import StageRecord
from greedy.stores.stage0 import pixel_kind

BATCH = 32  # images at a time: enough to be quick, and little memory beside the weights


@dataclass(frozen=True)
class Prediction:
    """The classes that the network finds in an image, the most likely first, with its confidence
    in each: softmax, from 0 to 1."""

    image: Path
    classes: Sequence[str]
    confidences: Sequence[float]


@dataclass(frozen=True)
class Unreadable:
    """An image that could not be read, and why in one sentence."""

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
    """Classifies image files with a network of ``greedy.runs.network.assemble``, or one like it, in
    float32 and evaluation mode: the ``top`` classes of each, in the order given. The network stays
    as and where it was. On the device at most ``memory_budget`` bytes are taken, by default those
    of the run's recipe.

    Images are read as those of a folder are, their transparent parts over the recipe's background,
    converted to the run's channels, resized until they cover the size of its images, and cropped
    at the centre.

    Raises:
        UserError: one of ``images`` is a folder, ``top`` is not positive, the budget is too small,
            or the run was not trained on images in bytes.
    """
    data = run.complete_record(0)
    _require_images(run, data)
    if top < 1:
        raise UserError(f"the {top} most likely classes are none: ask for 1 or more")
    for path in images:
        if path.is_dir():
            raise UserError(f"{path} is a folder: name the images in it, such as {path}/*.png")
    budget = memory_budget_of(run.recipe, device) if memory_budget is None else memory_budget
    forward = fit_forward(network, data.row_shape, budget, device.type)
    batch, reading = min(BATCH, forward.rows), Reading.of(run.recipe.data)

    def logits(x: np.ndarray) -> Tensor:
        return forward(raw_to_float(x, device))

    return (
        each
        for start in range(0, len(images), batch)
        for each in _predicted(data, reading, logits, images[start : start + batch], top)
    )


def _require_images(run: RunDirectory, data: StageRecord) -> None:
    channels = data.row_shape[0]
    if channels not in MODES:
        raise UserError(
            f"image files have 1 or 3 channels and the images of {run.path} {channels}: give "
            f"them to `greedy.runs.network.assemble`'s network in Python"
        )
    if data.store is not None and data.store.encoding == "float32" and pixel_kind(data) == "bytes":
        raise UserError(
            f"{run.path} was trained on floats, and what they are of an image file is not known: "
            f"give them to `greedy.runs.network.assemble`'s network in Python"
        )


def _predicted(
    data: StageRecord,
    reading: Reading,
    logits: Callable[[np.ndarray], Tensor],
    images: Sequence[Path],
    top: int,
) -> Iterator[Prediction | Unreadable]:
    with ThreadPoolExecutor() as pool:
        found = list(pool.map(lambda image: _read(image, data, reading), images))
    readable = [each for each in found if isinstance(each, np.ndarray)]
    answers = iter(_best(logits, np.stack(readable), top) if readable else ())
    for image, each in zip(images, found, strict=True):
        if isinstance(each, UserError):
            yield Unreadable(image, str(each))
        else:
            numbers, confidences = next(answers)
            yield Prediction(image, [data.class_names[n] for n in numbers], confidences)


@full_float32()
def _best(
    logits: Callable[[np.ndarray], Tensor], rows: np.ndarray, top: int
) -> list[tuple[list[int], list[float]]]:
    """The most likely classes of each row by their numbers, and the confidence in each."""
    confidences = logits(rows).softmax(dim=1)
    best = confidences.topk(min(top, confidences.shape[1]))
    return list(zip(best.indices.tolist(), best.values.tolist(), strict=True))


def _read(file: Path, data: StageRecord, reading: Reading) -> np.ndarray | UserError:
    """An image file as the rows of the data set are, (C, H, W) of bytes or float32."""
    channels, height, width = data.row_shape
    trained = pixel_kind(data)
    try:
        with opened(file, reading) as image:
            if image.kind != trained:
                raise UserError(
                    f"{file} holds {KINDS[image.kind]} and the network was trained on images of "
                    f"{KINDS[trained]}: bring the image to these"
                )
            return image.values(channels, reading.background, (height, width))
    except UserError as error:
        return error
