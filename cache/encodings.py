"""Encodings, which turn activations into stored numbers and back.

``Encoding.encode`` runs in background threads and is NumPy only; ``Encoding.decode`` is the one
place that uses torch, on the device that trains. Torch takes seconds to import, so
it is imported only where values are decoded.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from greedy.cache.errors import NonFiniteActivation, StoreError

if TYPE_CHECKING:
    import torch

ENCODINGS = ("float32", "float16", "bfloat16", "uint8", "uint4")
"""The names of all encodings."""

# The affine range of a channel: beyond these quantiles values saturate.
QUANTILES = (0.0005, 0.9995)

_STORED = {"float32": "<f4", "float16": "<f2", "bfloat16": "<u2", "uint8": "u1", "uint4": "u1"}
_TOP = {"uint8": 255, "uint4": 15}
# The largest float32 that still rounds to a finite number of the encoding.
_LIMIT = {
    "float16": float(np.nextafter(np.float32(65520), np.float32(0))),
    "bfloat16": float(np.uint32(0x7F7F7FFF).view(np.float32)),
}
_FLOAT32_MAX = float(np.finfo(np.float32).max)
# Values encoded at once: what is computed in between stays in the processor's cache.
_VALUES_AT_ONCE = 2**17


@dataclass(frozen=True, eq=False)
class Encoding:
    """One of ``ENCODINGS`` with the shape of a row and, for integers, each channel's affine range.

    A stored level q of channel c stands for (q - zero_point[c]) * scale[c].

    Attributes:
        name: one of ``ENCODINGS``.
        row_shape: the shape of a decoded row, (C, H, W), (T, C) or (F,).
        scale: float32 (C,), only for uint8 and uint4.
        zero_point: uint8 (C,), only for uint8 and uint4.

    Raises:
        StoreError: the parts do not fit together.
    """

    name: str
    row_shape: tuple[int, ...]
    scale: NDArray[np.float32] | None = None
    zero_point: NDArray[np.uint8] | None = None
    _tables: "dict[torch.device, tuple[torch.Tensor, torch.Tensor]]" = field(
        default_factory=dict, init=False, repr=False
    )

    def __post_init__(self) -> None:
        if self.name not in ENCODINGS:
            raise StoreError(f"unknown encoding {self.name!r}; choose from {', '.join(ENCODINGS)}")
        if len(self.row_shape) not in (1, 2, 3) or min(self.row_shape) < 1:
            raise StoreError(f"a row must be (C, H, W), (T, C) or (F,), not {self.row_shape}")
        if (self.scale is not None, self.zero_point is not None) != (self.integer, self.integer):
            raise StoreError("uint8 and uint4 take a scale and a zero point, other encodings none")
        if self.scale is not None and self.zero_point is not None:
            channels = (self.row_shape[channel_axis(self.row_shape)],)
            if self.scale.shape != channels or self.zero_point.shape != channels:
                raise StoreError(
                    f"scale and zero point must have {channels[0]} entries, one a channel"
                )
            if not (np.isfinite(self.scale) & (self.scale > 0)).all():
                raise StoreError("every channel's scale must be finite and above zero")
            if (self.zero_point > _TOP[self.name]).any():
                raise StoreError(f"a zero point of {self.name} is at most {_TOP[self.name]}")

    @property
    def integer(self) -> bool:
        """Whether levels are stored, with one range for each channel."""
        return self.name in _TOP

    @property
    def row_size(self) -> int:
        """Number of values in a row."""
        return math.prod(self.row_shape)

    @property
    def stored_dtype(self) -> np.dtype[Any]:
        """The dtype of the stored array: bfloat16 is kept as uint16 bits, uint4 as pairs in
        uint8."""
        return np.dtype(_STORED[self.name])

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """The shape of a stored row: (ceil(F/2),) for uint4, otherwise ``row_shape``."""
        return (-(-self.row_size // 2),) if self.name == "uint4" else self.row_shape

    @property
    def stored_row_bytes(self) -> int:
        """Bytes of a stored row before compression."""
        return math.prod(self.stored_shape) * self.stored_dtype.itemsize

    def encode(self, values: NDArray[np.float32]) -> NDArray[Any]:
        """Converts float32 ``(n, *row_shape)`` to the stored form ``(n, *stored_shape)``.

        Raises:
            NonFiniteActivation: naming the channel.
        """
        self._check_range(values)
        if self.name == "float32":
            return values
        stored = np.empty((len(values), *self.stored_shape), self.stored_dtype)
        step = max(_VALUES_AT_ONCE // self.row_size, 1)
        for start in range(0, len(values), step):
            stored[start : start + step] = self._stored(values[start : start + step])
        return stored

    def decode(self, stored: "torch.Tensor") -> "torch.Tensor":
        """Converts ``(n, *stored_shape)`` to float32 ``(n, *row_shape)``, on the same device."""
        import torch  # noqa: PLC0415

        if self.name == "bfloat16":
            return stored.view(torch.bfloat16).float()
        if not self.integer:
            return stored.float()
        levels = stored
        if self.name == "uint4":
            pairs = torch.stack((stored & 15, stored >> 4), dim=-1)
            levels = pairs.flatten(1)[:, : self.row_size].unflatten(1, self.row_shape)
        scale, zero_point = self._tables_on(stored.device)
        return levels.float().sub_(zero_point).mul_(scale)

    def decode_array(self, stored: NDArray[Any]) -> NDArray[np.float32]:
        """Converts a NumPy array ``(n, *stored_shape)`` to float32 ``(n, *row_shape)``, bit for bit
        as ``decode`` does."""
        if self.name == "bfloat16":
            return (stored.astype(np.uint32) << 16).view(np.float32)
        if self.scale is None or self.zero_point is None:
            return stored.astype(np.float32)
        levels = stored
        if self.name == "uint4":
            levels = _unpack(stored, self.row_size).reshape(-1, *self.row_shape)
        decoded = levels.astype(np.float32)
        decoded -= self._spread(self.zero_point.astype(np.float32))
        decoded *= self._spread(self.scale)
        return decoded

    def to_json(self) -> dict[str, Any]:
        """Returns name, scale and zero point for a store's attributes; floats survive exactly."""
        document: dict[str, Any] = {"name": self.name}
        if self.scale is not None and self.zero_point is not None:
            document["scale"] = self.scale.tolist()
            document["zero_point"] = self.zero_point.tolist()
        return document

    @classmethod
    def from_json(cls, document: Mapping[str, Any], row_shape: tuple[int, ...]) -> "Encoding":
        """Returns the encoding of which ``to_json`` made ``document``.

        Raises:
            StoreError: the document does not describe an encoding of rows of this shape.
        """
        try:
            name = document["name"]
            if "scale" not in document:
                return cls(name, row_shape)
            with np.errstate(over="ignore"):  # what becomes infinite is refused below
                scale = np.array(document["scale"], dtype=np.float64).astype(np.float32)
            zero_point = np.array(document["zero_point"])
            if (
                zero_point.dtype.kind not in "iu"
                or not ((zero_point >= 0) & (zero_point < 256)).all()
            ):
                raise StoreError("zero points must be integers from 0 to 255")
            return cls(name, row_shape, scale, zero_point.astype(np.uint8))
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise StoreError("the encoding in the store's attributes cannot be read") from error

    def _stored(self, values: NDArray[np.float32]) -> NDArray[Any]:
        if self.name == "float16":
            return values.astype(self.stored_dtype)
        if self.name == "bfloat16":
            return _bfloat16_bits(values)
        levels = self._quantise(values)
        return levels if self.name == "uint8" else _pack(levels.reshape(len(levels), -1))

    def _check_range(self, values: NDArray[np.float32]) -> None:
        limit = _LIMIT.get(self.name, _FLOAT32_MAX)
        if not values.size or (values.min() >= -limit and values.max() <= limit):
            return
        outside = np.argwhere(~(np.abs(values) <= limit))
        channels = outside[:, 1 + channel_axis(self.row_shape)]
        first = outside[channels.argmin()]
        raise NonFiniteActivation(int(channels.min()), float(values[tuple(first)]), self.name)

    def _quantise(self, values: NDArray[np.float32]) -> NDArray[np.uint8]:
        assert self.scale is not None
        assert self.zero_point is not None
        with np.errstate(over="ignore"):  # an infinite quotient saturates like any other
            levels = values / self._spread(self.scale)
        np.rint(levels, out=levels)
        levels += self._spread(self.zero_point.astype(np.float32))
        np.clip(levels, 0, _TOP[self.name], out=levels)
        return levels.astype(np.uint8)

    def _spread(self, table: NDArray[np.float32]) -> NDArray[np.float32]:
        return table.reshape(-1, *[1] * (len(self.row_shape) - 1 - channel_axis(self.row_shape)))

    def _tables_on(self, device: "torch.device") -> "tuple[torch.Tensor, torch.Tensor]":
        """Returns scale and zero point on a device. They are copied there once, so that no batch
        waits for a copy."""
        import torch  # noqa: PLC0415

        if device not in self._tables:
            assert self.scale is not None
            assert self.zero_point is not None
            scale = torch.from_numpy(self._spread(self.scale).copy())
            zero_point = torch.from_numpy(self._spread(self.zero_point.astype(np.float32)))
            self._tables[device] = (scale.to(device), zero_point.to(device))
        return self._tables[device]


def channel_axis(row_shape: tuple[int, ...]) -> int:
    """Returns the axis of a row's channels: last in tokens (T, C), first in all others."""
    return 1 if len(row_shape) == 2 else 0


def fit_encoding(name: str, sample: NDArray[np.float32]) -> Encoding:
    """Returns the encoding ``name``, fitted to the rows of ``sample``, float32 (n, *row_shape).

    Integer encodings get one affine range for each channel, from its ``QUANTILES`` in the sample,
    widened to contain zero, with zero exactly representable. A channel whose range is empty gets
    scale 1.

    Raises:
        NonFiniteActivation: naming the channel.
        StoreError: the name is unknown or a row has an unsupported shape.
    """
    row_shape = sample.shape[1:]
    if name not in _TOP:
        return Encoding(name, row_shape)
    Encoding("float32", row_shape)._check_range(sample)
    axis = channel_axis(row_shape)
    scale = np.ones(row_shape[axis], np.float32)
    zero_point = np.zeros(row_shape[axis], np.uint8)
    for channel in range(row_shape[axis]):
        # A channel at a time: a copy of one channel in float32, never of the sample.
        values = sample.take(channel, axis=1 + axis)
        low, high = np.quantile(values.ravel(), QUANTILES).astype(np.float64)
        low, high = min(low, 0.0), max(high, 0.0)
        step = np.float32((high - low) / _TOP[name])
        if step >= np.finfo(np.float32).tiny:
            scale[channel] = step
            zero_point[channel] = np.rint(-low / float(step))
    return Encoding(name, row_shape, scale, zero_point)


def pixel_encoding(row_shape: tuple[int, ...]) -> Encoding:
    """Returns the encoding of raw uint8 images (C, H, W), which decode to [0, 1]."""
    channels = row_shape[0]
    scale = np.full(channels, 1 / 255, np.float32)
    return Encoding("uint8", row_shape, scale, np.zeros(channels, np.uint8))


def _bfloat16_bits(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    bits = values.view(np.uint32)
    rounded = (bits >> 16) & 1
    rounded += 0x7FFF  # to nearest, ties to even
    rounded += bits
    rounded >>= 16
    return rounded.astype(np.uint16)


def _pack(levels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Packs 4-bit levels (n, F) in pairs into bytes (n, ceil(F/2)), the first in the low nibble."""
    packed = levels[:, 0::2].copy()
    packed[:, : levels.shape[1] // 2] |= levels[:, 1::2] << 4
    return packed


def _unpack(packed: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    levels = np.empty((len(packed), 2 * packed.shape[1]), np.uint8)
    levels[:, 0::2] = packed & 15
    levels[:, 1::2] = packed >> 4
    return levels[:, :size]
