"""One sample of a map-style data set: which of its parts are image and label."""

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any

IMAGE_KEYS = ("image", "img", "pixel_values")
LABEL_KEYS = ("label", "labels", "fine_label")


def image_and_label(sample: Any) -> tuple[Any, Any]:
    """Returns the image and the label of a sample: a pair in this order, or a mapping, named tuple
    or object with one of ``IMAGE_KEYS`` and one of ``LABEL_KEYS``.

    Raises ``ValueError``, saying what the sample holds, for any other.
    """
    named = _named_parts(sample)
    images, labels = ([key for key in keys if key in named] for keys in (IMAGE_KEYS, LABEL_KEYS))
    if len(images) == len(labels) == 1:
        return named[images[0]], named[labels[0]]
    if isinstance(sample, tuple | list) and len(sample) == 2:
        return sample[0], sample[1]
    if named:
        raise ValueError(
            f"has the keys {', '.join(map(repr, named))}: give one of {_listed(IMAGE_KEYS)} and "
            f"one of {_listed(LABEL_KEYS)}"
        )
    if isinstance(sample, tuple | list):
        kinds = ", ".join(type(item).__name__ for item in sample)
        raise ValueError(
            f"has {len(sample)} items ({kinds}) and not two: give the pair (image, label), or a "
            f"dictionary with the keys 'image' and 'label'"
        )
    raise ValueError(
        f"is of type {type(sample).__name__} and no pair: give (image, label), or a dictionary "
        f"with the keys 'image' and 'label'"
    )


def _named_parts(sample: Any) -> Mapping[str, Any]:
    if isinstance(sample, Mapping):
        return sample
    if hasattr(sample, "_asdict"):  # a named tuple
        return sample._asdict()
    if is_dataclass(sample):
        return {field.name: getattr(sample, field.name) for field in fields(sample)}
    keys = (key for key in (*IMAGE_KEYS, *LABEL_KEYS) if hasattr(sample, key))
    return {key: getattr(sample, key) for key in keys}


def _listed(keys: tuple[str, ...]) -> str:
    return f"{', '.join(map(repr, keys[:-1]))} and {keys[-1]!r}"
