"""Encodings: error bounds, rounding, and the two decoders' agreement."""

import json

import hypothesis.extra.numpy as arrays
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from greedy.cache import (
    ENCODINGS,
    Encoding,
    NonFiniteActivation,
    StoreError,
    fit_encoding,
    pixel_encoding,
)

MODEST = settings(max_examples=60, deadline=None)
ROW_SHAPES = st.sampled_from([(1,), (7,), (10,), (3, 3, 5), (4, 2, 2), (1, 1, 1)])


def rows(limit: float) -> st.SearchStrategy[np.ndarray]:
    """Draws float32 (n, *row_shape) with values up to ``limit``."""
    bound = float(np.float32(limit))
    values = st.floats(-bound, bound, width=32)
    return st.tuples(st.integers(1, 6), ROW_SHAPES).flatmap(
        lambda drawn: arrays.arrays(np.float32, (drawn[0], *drawn[1]), elements=values)
    )


def decoded(encoding: Encoding, stored: np.ndarray) -> np.ndarray:
    """Decodes with both decoders, which must agree bit for bit."""
    by_torch = encoding.decode(torch.from_numpy(stored)).numpy()
    by_numpy = encoding.decode_array(stored)
    assert by_torch.dtype == by_numpy.dtype == np.float32
    assert by_torch.tobytes() == by_numpy.tobytes()
    return by_numpy


@MODEST
@given(rows(3e38))
def test_float32_is_exact(values: np.ndarray) -> None:
    encoding = fit_encoding("float32", values)
    assert decoded(encoding, encoding.encode(values)).tobytes() == values.tobytes()


@MODEST
@given(rows(65504))
def test_float16_rounds_as_torch_does(values: np.ndarray) -> None:
    encoding = fit_encoding("float16", values)
    expected = torch.from_numpy(values).half().float().numpy()
    np.testing.assert_array_equal(decoded(encoding, encoding.encode(values)), expected)


@MODEST
@given(rows(3e38))
def test_bfloat16_rounds_as_torch_does(values: np.ndarray) -> None:
    encoding = fit_encoding("bfloat16", values)
    expected = torch.from_numpy(values).bfloat16().float().numpy()
    np.testing.assert_array_equal(decoded(encoding, encoding.encode(values)), expected)


def test_bfloat16_rounds_ties_to_even() -> None:
    halfway = np.array([[1 + 2**-8, 1 + 3 * 2**-8]], np.float32)
    encoding = Encoding("bfloat16", (2,))
    expected = np.array([[1, 1 + 2**-6]], np.float32)
    np.testing.assert_array_equal(encoding.decode_array(encoding.encode(halfway)), expected)


@MODEST
@given(rows(1e6), st.sampled_from(["uint8", "uint4"]))
def test_integers_err_by_half_a_step_within_range(values: np.ndarray, name: str) -> None:
    encoding = fit_encoding(name, values)
    top = 255 if name == "uint8" else 15
    spread = (-1, *[1] * (values.ndim - 2))
    scale = encoding.scale.astype(np.float64).reshape(spread)
    zero = encoding.zero_point.astype(np.float64).reshape(spread)
    inside = np.clip(values, -zero * scale, (top - zero) * scale)
    error = np.abs(decoded(encoding, encoding.encode(values)) - inside)
    assert (error <= scale * 0.5001 + np.abs(inside) * 1e-6).all()


@MODEST
@given(rows(1e30), st.sampled_from(ENCODINGS))
def test_zero_is_exact_and_shapes_are_kept(values: np.ndarray, name: str) -> None:
    encoding = fit_encoding(name, values)
    stored = encoding.encode(np.zeros_like(values))
    assert stored.dtype == encoding.stored_dtype
    assert stored.shape == (len(values), *encoding.stored_shape)
    np.testing.assert_array_equal(decoded(encoding, stored), np.zeros_like(values))


@MODEST
@given(rows(1e30), st.sampled_from(ENCODINGS))
def test_json_keeps_an_encoding(values: np.ndarray, name: str) -> None:
    encoding = fit_encoding(name, values)
    text = json.dumps(encoding.to_json())
    again = Encoding.from_json(json.loads(text), encoding.row_shape)
    stored = fit_encoding(name, values).encode(np.clip(values, -6e4, 6e4))
    assert again.decode_array(stored).tobytes() == encoding.decode_array(stored).tobytes()


@pytest.mark.parametrize("name", ENCODINGS)
def test_many_rows_are_encoded_as_each_alone(name: str) -> None:
    values = np.random.default_rng(0).standard_normal((9, 5, 90, 111), np.float32)
    encoding = fit_encoding(name, values)
    alone = [encoding.encode(values[row : row + 1]) for row in range(len(values))]
    assert np.array_equal(encoding.encode(values), np.concatenate(alone))


def test_integers_saturate_and_round_half_to_even() -> None:
    ones = np.ones(1, np.float32)
    encoding = Encoding("uint8", (1,), ones, np.array([100], np.uint8))
    values = np.array([[-1e38], [-101], [0.5], [1.5], [2.5], [1e38]], np.float32)
    assert encoding.encode(values).ravel().tolist() == [0, 0, 100, 102, 102, 255]


def test_uint4_puts_the_first_value_in_the_low_nibble() -> None:
    encoding = Encoding("uint4", (3,), np.ones(3, np.float32), np.zeros(3, np.uint8))
    stored = encoding.encode(np.array([[1, 2, 3]], np.float32))
    assert stored.tolist() == [[0x21, 0x03]]


def test_range_is_a_channel_s_quantiles() -> None:
    sample = np.zeros((2000, 2, 2, 2), np.float32)
    sample[:, 0] = np.linspace(-1, 3, 8000, dtype=np.float32).reshape(2000, 2, 2)
    sample[0, 0, 0, 0] = 1e9  # one outlier in 8,000 is beyond the quantile
    encoding = fit_encoding("uint8", sample)
    assert encoding.scale[0] == pytest.approx(4 / 255, rel=2e-3)
    assert encoding.zero_point[0] == 64
    assert (encoding.scale[1], encoding.zero_point[1]) == (1, 0)


def test_constant_channel_survives() -> None:
    sample = np.full((10, 1), 1000, np.float32)
    encoding = fit_encoding("uint4", sample)
    np.testing.assert_allclose(encoding.decode_array(encoding.encode(sample)), sample, rtol=1e-6)


@pytest.mark.parametrize("name", ENCODINGS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_non_finite_value_names_its_channel(name: str, value: float) -> None:
    sample = np.random.default_rng(0).standard_normal((4, 5, 2, 2)).astype(np.float32)
    encoding = fit_encoding(name, sample)
    sample[2, 3, 1, 0] = value
    with pytest.raises(NonFiniteActivation, match="channel 3") as caught:
        encoding.encode(sample)
    assert caught.value.channel == 3
    with pytest.raises(NonFiniteActivation, match="channel 3"):
        fit_encoding("uint8", sample)


@pytest.mark.parametrize(
    ("name", "fits", "beyond"),
    [
        ("float16", 65519, 65520),
        ("bfloat16", 3.3895e38, 3.3999e38),
    ],
)
def test_value_beyond_a_float_s_range_is_refused(name: str, fits: float, beyond: float) -> None:
    encoding = Encoding(name, (1,))
    assert np.isfinite(encoding.decode_array(encoding.encode(np.array([[fits]], np.float32))))
    with pytest.raises(NonFiniteActivation, match=name):
        encoding.encode(np.array([[beyond]], np.float32))


def test_pixels_decode_to_the_unit_interval() -> None:
    stored = np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16)
    values = decoded(pixel_encoding((1, 16, 16)), stored)
    np.testing.assert_allclose(values.ravel(), np.arange(256) / 255, rtol=1e-6)


@pytest.mark.parametrize("document", [
    {},
    [],
    {"name": "int3"},
    {"name": ["uint8"]},
    {"name": "uint8"},
    {"name": "float32", "scale": [1.0, 1.0], "zero_point": [0, 0]},
    {"name": "uint8", "scale": [1.0], "zero_point": [0]},
    {"name": "uint8", "scale": [1.0, 0.0], "zero_point": [0, 0]},
    {"name": "uint8", "scale": [1.0, float("nan")], "zero_point": [0, 0]},
    {"name": "uint8", "scale": [1.0, 1e300], "zero_point": [0, 0]},
    {"name": "uint8", "scale": [1.0, "x"], "zero_point": [0, 0]},
    {"name": "uint8", "scale": [1.0, 1.0], "zero_point": [0, 256]},
    {"name": "uint8", "scale": [1.0, 1.0], "zero_point": [0, -1]},
    {"name": "uint8", "scale": [1.0, 1.0], "zero_point": [0.5, 0]},
    {"name": "uint4", "scale": [1.0, 1.0], "zero_point": [0, 16]},
])  # fmt: skip
def test_broken_document_is_refused(document: object) -> None:
    with pytest.raises(StoreError):
        Encoding.from_json(document, (2,))
