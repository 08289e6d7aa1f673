"""Map-style data sets: anything with a length and ``[index]`` giving (image, label)."""

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from greedy.data.splits import Dataset, Images, Labels, Rows, Shape
from greedy.errors import UserError
from greedy.functions import call_function

PIL_MODES = {"1": "L", "L": "L", "LA": "L", "P": "RGB", "RGB": "RGB", "RGBA": "RGB", "CMYK": "RGB"}


def dataset_from_torch(train_set: Any, test_set: Any, name: str = "python") -> Dataset:
    """The data set of two map-style sets of samples (image, label).

    An image is a PIL image (grey or RGB), a uint8 tensor or array, or a floating-point one, which
    becomes float32 and is otherwise used as it is: (C, H, W), (H, W), or a vector (F,), which
    becomes (F, 1, 1), so that features are normalised one by one. Labels are integers from 0.
    Class names are those of ``train_set.classes``, None where it has none.

    Raises UserError for anything else, here or when the sample is read.
    """
    classes = getattr(train_set, "classes", None)
    class_names = None if classes is None else [str(entry) for entry in classes]
    train, test = MapSplit(train_set, f"{name} train"), MapSplit(test_set, f"{name} test")
    return Dataset(name, train, test, class_names)


def load_function(name: str) -> Dataset:
    """The data set of ``module:function``, called without arguments for its two map-style sets.

    The current directory is importable. Raises UserError where there is no such function, or it
    does not return a pair.
    """
    sets = call_function(name)
    if not (isinstance(sets, tuple) and len(sets) == 2):
        raise UserError(f"{name} must return two map-style data sets, (train, test)")
    return dataset_from_torch(*sets, name=name)


class MapSplit:
    """A map-style data set as a split; shape and dtype are those of its first sample."""

    def __init__(self, samples: Any, name: str) -> None:
        if not (hasattr(samples, "__len__") and hasattr(samples, "__getitem__")):
            raise UserError(f"{name} must be a map-style data set, with a length and [index]")
        if not len(samples):
            raise UserError(f"{name} is empty: give it samples")
        self._samples, self._name = samples, name
        image, _ = self._sample(0)
        self.shape: Shape = image.shape
        self.dtype: np.dtype[Any] = image.dtype

    def __len__(self) -> int:
        return len(self._samples)

    def read(self, indices: Rows) -> tuple[Images, Labels]:
        images = np.empty((len(indices), *self.shape), self.dtype)
        labels = np.empty(len(indices), np.int64)
        for i, index in enumerate(indices):
            image, labels[i] = self._sample(int(index))
            if (image.shape, image.dtype) != (self.shape, self.dtype):
                raise UserError(
                    f"sample {index} of {self._name} is {image.dtype} of shape {image.shape}, "
                    f"sample 0 {self.dtype} of shape {self.shape}: make them alike"
                )
            images[i] = image
        return images, labels

    def _sample(self, index: int) -> tuple[npt.NDArray[Any], int]:
        sample = self._samples[index]
        try:
            image, label = sample
            return _as_image(image), _as_label(label)
        except (TypeError, ValueError) as error:
            raise UserError(
                f"sample {index} of {self._name} is not an (image, label) pair: {error}"
            ) from error


def _as_image(image: Any) -> npt.NDArray[Any]:
    if isinstance(image, Image.Image):
        if image.mode not in PIL_MODES:
            raise ValueError(f"convert PIL images of mode {image.mode} to L or RGB")
        pixels = np.asarray(image.convert(PIL_MODES[image.mode]))
        return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
    if isinstance(image, torch.Tensor):
        image = image.detach().cpu()
        image = (image.float() if image.is_floating_point() else image).numpy()
    array = np.asarray(image)
    if np.issubdtype(array.dtype, np.floating):
        array = array.astype(np.float32, copy=False)
        array = array[:, None, None] if array.ndim == 1 else array
    elif array.dtype != np.uint8:
        raise ValueError(f"an image must be uint8 or floating-point, not {array.dtype}")
    array = array[None] if array.ndim == 2 else array
    if array.ndim != 3:
        raise ValueError(f"an image must be (C, H, W) or (H, W), not {array.shape}")
    return array


def _as_label(label: Any) -> int:
    array = np.asarray(label)
    if array.size != 1 or not np.issubdtype(array.dtype, np.integer) or array.item() < 0:
        raise ValueError(f"a label must be an integer from 0, not {label!r}")
    return int(array.item())
