"""Quantization: the bounds that the module's docstring promises."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from fedlora.errors import FormatError, NonFiniteError
from fedlora.formats.codecs import dequantize, pack_nibbles, quantize, to_half, unpack_nibbles
from tests.matching import raises

LEVELS = {"int8": 127, "int4": 7}
MATRICES = arrays(
    np.float32,
    array_shapes(min_dims=2, max_dims=2, max_side=6),
    elements=st.floats(-(2.0**100), 2.0**100, width=32),
)


@pytest.mark.parametrize("codec", LEVELS)
@settings(max_examples=200, deadline=None)
@given(rows=MATRICES)
def test_error_is_at_most_half_a_scale(codec, rows):
    integers, scales = quantize(rows, codec)
    error = np.abs(dequantize(integers, scales).astype(np.float64) - rows)
    # The second term is the rounding of q * scale to float32.
    bound = scales.astype(np.float64)[:, None] * (0.5 + LEVELS[codec] * 2.0**-24)
    assert (error <= bound).all()
    assert np.abs(integers).max() <= LEVELS[codec]
    np.testing.assert_allclose(
        scales, np.abs(rows).max(axis=1) / LEVELS[codec], rtol=2e-7, atol=1.5e-45
    )


@pytest.mark.parametrize("codec", LEVELS)
def test_rows_do_not_share_a_scale(codec):
    rows = np.array([[1e-6, -1e-6], [1e6, 0.0], [0.0, 0.0]], np.float32)
    integers, scales = quantize(rows, codec)
    levels = LEVELS[codec]
    np.testing.assert_array_equal(integers, [[levels, -levels], [levels, 0], [0, 0]])
    assert scales[2] == 0
    np.testing.assert_allclose(dequantize(integers, scales), rows, rtol=1e-6)


@settings(deadline=None)
@given(rows=arrays(np.int8, array_shapes(min_dims=2, max_dims=2, max_side=7),
                   elements=st.integers(-8, 7)))  # fmt: skip
def test_nibbles_come_back(rows):
    packed = pack_nibbles(rows)
    assert packed.shape == (len(rows), (rows.shape[1] + 1) // 2)
    assert packed.dtype == np.uint8
    np.testing.assert_array_equal(unpack_nibbles(packed, rows.shape[1]), rows)


def test_first_value_is_in_the_lower_half_byte():
    assert pack_nibbles(np.array([[1, -1, 7]], np.int8)).tolist() == [[0xF1, 0x07]]


def test_half_byte_after_the_last_value_must_be_zero():
    with raises(FormatError, "expected zero in the half byte"):
        unpack_nibbles(np.array([[0x10]], np.uint8), 1)


@pytest.mark.parametrize("scale", [np.nan, np.inf, -1.0])
def test_scale_that_is_none_is_refused(scale):
    with raises(FormatError, "scales: expected finite numbers >= 0"):
        dequantize(np.zeros((1, 1), np.int8), np.array([scale], np.float32))


@settings(deadline=None)
@given(arrays(np.float32, 5, elements=st.floats(-65504, 65504, width=32)))
def test_half_precision_error_is_bounded(values):
    error = np.abs(to_half(values, "x").astype(np.float64) - values)
    assert (error <= np.maximum(np.abs(values) * 2.0**-11, 2.0**-25)).all()


def test_overflow_of_half_precision_is_refused():
    with raises(
        NonFiniteError, "layer 'a', B: codec fp16 holds numbers up to 65504, found 6.6e+04"
    ):
        to_half(np.array([1, -66000], np.float32), "layer 'a', B")
