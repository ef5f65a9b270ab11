"""The quantizer against its slow twin, and the error that it states for a sum."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.errors import NonFiniteError, SecureSumError, SecureTermsError, ShapeMismatchError
from fedlora.privacy.secure import Quantizer
from tests.matching import raises
from tests.reference import secure as slow

RANGES = st.sampled_from([1e-6, 0.5, 1.0, 3.7, 1e9])


@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize("clients", [1, 2, 3, 100, 10_000])
def test_as_many_levels_as_fit_the_ring_and_float64(bits, clients):
    half = Quantizer(bits, 1.0, clients).half_levels
    assert half == slow.levels(bits, clients)
    assert 2 * half * clients < 2**bits
    assert half == 2**52 or 2 * (half + 1) * clients >= 2**bits


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(st.floats(-2, 2, width=64), max_size=20),
    bits=st.sampled_from([32, 64]),
    clients=st.integers(1, 5000),
    clipping_range=RANGES,
    seed=st.integers(0, 99),
)
def test_ring_numbers_are_those_of_the_slow_twin(values, bits, clients, clipping_range, seed):
    vector = np.array(values, np.float64) * clipping_range
    fast = Quantizer(bits, clipping_range, clients).quantize(vector, np.random.default_rng(seed))
    expected = slow.quantize(vector, bits, clipping_range, clients, np.random.default_rng(seed))
    assert fast.dtype == (np.uint32 if bits == 32 else np.uint64)
    assert fast.tolist() == expected


@settings(max_examples=60, deadline=None)
@given(
    bits=st.sampled_from([32, 64]),
    count=st.integers(0, 30),
    spare=st.integers(0, 70),
    size=st.integers(0, 5),
    clipping_range=RANGES,
    seed=st.integers(0, 99),
)
def test_a_sum_is_off_by_less_than_a_step_a_client(bits, count, spare, size, clipping_range, seed):
    quantizer = Quantizer(bits, clipping_range, count + spare + 1)
    draws = np.random.default_rng(seed)
    # Beyond the range as well, and exactly at its ends.
    vectors = clipping_range * np.clip(draws.uniform(-1.5, 1.5, (count, size)), -1.2, 1)
    ring = [quantizer.quantize(vector, draws) for vector in vectors]
    summed = sum(ring, np.zeros(size, quantizer.dtype))
    found = quantizer.dequantize(summed, count)
    twin = slow.total([r.tolist() for r in ring], bits, quantizer.step) if count else np.zeros(size)
    # Above 2**53 the whole sum is rounded once to float64.
    assert np.allclose(found, twin, rtol=2**-52, atol=0)
    exact = np.clip(vectors, -clipping_range, clipping_range).sum(axis=0)
    rounding = 1e-15 * (count + 1) ** 2 * clipping_range  # of float64's own sums
    assert (np.abs(found - exact) <= quantizer.error_bound(count) + rounding).all()


@pytest.mark.parametrize("bits", [32, 64])
def test_zero_and_both_ends_are_exact(bits):
    quantizer = Quantizer(bits, 2.0, 7)
    vector = np.array([0.0, -0.0, 2.0, -2.0, 1e300, -1e300])
    for seed in range(20):
        ring = quantizer.quantize(vector, np.random.default_rng(seed))
        found = quantizer.dequantize(ring, 1)
        # 2 / step steps: exact to float64's rounding.
        assert np.allclose(found, [0, 0, 2, -2, 2, -2], rtol=2**-51, atol=0)


def test_rounding_adds_no_more_to_a_norm_than_stated():
    quantizer = Quantizer(32, 1.0, 2**24)  # 127 steps on each side
    draws = np.random.default_rng(0)
    for _ in range(50):
        vector = draws.normal(size=200) * 0.01
        found = quantizer.dequantize(quantizer.quantize(vector, draws), 1)
        assert np.linalg.norm(found) <= np.linalg.norm(vector) + quantizer.norm_bound(200)
        assert np.linalg.norm(found - vector) < quantizer.norm_bound(200)


def test_rounding_keeps_the_mean():
    quantizer = Quantizer(32, 1.0, 2**20)  # 2047 steps on each side
    value = 0.3 * quantizer.step
    draws = np.random.default_rng(1)
    found = quantizer.dequantize(quantizer.quantize(np.full(100_000, value), draws), 1)
    # The mean of 100,000 draws of a step with probability 0.3: standard deviation 0.00145 steps.
    assert abs(found.mean() / quantizer.step - 0.3) < 5 * 0.00145


def test_a_vector_longer_than_one_part_is_quantized_like_its_parts():
    quantizer = Quantizer(32, 1.0, 10)
    vector = np.random.default_rng(0).uniform(-1, 1, 150_000)
    draws, again = np.random.default_rng(1), np.random.default_rng(1)
    parts = np.split(vector, [65_536, 131_072])
    whole = quantizer.quantize(vector, draws)
    assert np.array_equal(whole, np.concatenate([quantizer.quantize(p, again) for p in parts]))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_none_are_refused(bad):
    with raises(NonFiniteError, "NaN or infinity"):
        Quantizer(32, 1.0, 2).quantize(np.array([0.0, bad]), np.random.default_rng(0))


def test_a_matrix_is_refused():
    with raises(ShapeMismatchError, "(2, 2)"):
        Quantizer(32, 1.0, 2).quantize(np.zeros((2, 2)), np.random.default_rng(0))


def test_a_sum_that_its_clients_cannot_have_is_refused():
    quantizer = Quantizer(32, 1.0, 10)
    total = np.array([0, 2 * quantizer.half_levels + 1], np.uint32)
    with raises(SecureSumError, "number 1", "2 clients"):
        quantizer.dequantize(total, 2)
    with raises(SecureSumError, "at most 10 vectors", "11"):
        quantizer.dequantize(total, 11)


def test_a_ring_without_room_for_the_clients_is_refused():
    with raises(SecureTermsError, "32 bits", "64"):
        Quantizer(32, 1.0, 2**31)
