"""The SVD of products and of their sums against the dense one."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.low_rank import ProductSum, Spectrum, svd_of_product, svd_of_products
from tests.reference import low_rank as slow

Part = tuple[np.ndarray, np.ndarray, float]


@st.composite
def parts(draw: st.DrawFn) -> list[Part]:
    """Factors of 1 to 5 products, some of rank over the matrix, some weights below zero."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    out, width = draw(st.integers(1, 24)), draw(st.integers(1, 24))
    ranks = draw(st.lists(st.integers(1, 4), min_size=1, max_size=5))
    weights = st.floats(-3, 3).filter(lambda w: abs(w) > 1e-3)
    return [(rng.normal(size=(out, r)), rng.normal(size=(r, width)), draw(weights)) for r in ranks]


def summed(of: list[Part]) -> ProductSum:
    total = ProductSum(of[0][0].shape[0], of[0][1].shape[1])
    for B, A, weight in of:
        total.add(B, A, weight)
    return total


@settings(max_examples=60)
@given(parts(), st.floats(0.1, 10), st.floats(0.1, 10))
def test_a_sum_of_products_is_the_dense_sum(of: list[Part], divisor: float, scale: float) -> None:
    """Float64 rounding, in units of what went in: products may cancel."""
    spectrum, dense = summed(of).svd(divisor), slow.dense_sum(of) / divisor
    size = sum(abs(w) * np.linalg.norm(B) * np.linalg.norm(A) for B, A, w in of) / divisor
    close = 1e-13 * (1 + size)
    np.testing.assert_allclose(spectrum.product, dense, rtol=0, atol=close)
    B, A = spectrum.balanced(scale)
    np.testing.assert_allclose(scale * B @ A, dense, rtol=0, atol=close)
    np.testing.assert_allclose(scale * B.T @ B, np.diag(spectrum.values), rtol=0, atol=close)
    assert spectrum.rank == np.linalg.matrix_rank(dense)
    assert spectrum.energy == pytest.approx(np.sum(dense**2), abs=close * (1 + size))


@settings(max_examples=60)
@given(parts(), st.integers(1, 6))
def test_a_cut_is_the_nearest_of_its_rank(of: list[Part], rank: int) -> None:
    dense = slow.dense_sum(of)
    found = summed(of).svd().cut(rank).product
    np.testing.assert_allclose(found, slow.best_of_rank(dense, rank), rtol=0, atol=1e-9)


@given(parts())
def test_the_signs_do_not_hang_on_the_order(of: list[Part]) -> None:
    """Distinct singular values, so that the vectors are unique but for their signs."""
    one, two = summed(of).svd(), summed(of[::-1]).svd()
    gaps = np.diff(np.append(one.values, 0.0))
    if one.rank != two.rank or np.any(-gaps < 1e-3 * one.values[:1]):
        return
    np.testing.assert_allclose(one.right, two.right, rtol=0, atol=1e-8)
    assert np.all(one.right[np.arange(one.rank), np.abs(one.right).argmax(axis=1)] > 0)


@given(parts())
def test_what_cancels_altogether_has_rank_zero(of: list[Part]) -> None:
    both = of + [(B, A, -weight) for B, A, weight in of]
    assert summed(both).svd().rank == 0
    assert ProductSum(3, 4).svd().product.shape == (3, 4)


def test_the_rank_for_an_energy() -> None:
    spectrum = Spectrum(np.eye(3), np.array([3.0, 2.0, 1.0]), np.eye(3))  # squares 9, 4, 1 of 14
    found = [spectrum.rank_for(e) for e in (0.5, 9 / 14, 0.65, 13 / 14 - 1e-9, 0.95, 1.0)]
    assert found == [1, 1, 2, 2, 3, 3]
    assert ProductSum(3, 4).svd().rank_for(1.0) == 0


def test_the_dense_matrix_is_formed_only_when_it_is_cheaper() -> None:
    rng = np.random.default_rng(0)
    total = ProductSum(40, 60)
    for number in range(5):
        assert not total.is_dense
        total.add(rng.normal(size=(40, 4)), rng.normal(size=(4, 60)))
        assert total.is_dense == (2 * 4 * (number + 1) >= 40)


def test_memory_stops_growing_at_the_dense_matrix() -> None:
    rng = np.random.default_rng(0)

    def peak(count: int) -> int:
        tracemalloc.start()
        total = ProductSum(200, 200)
        for _ in range(count):
            total.add(rng.normal(size=(200, 8)), rng.normal(size=(8, 200)))
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    peak(20)
    assert peak(200) < 1.2 * peak(20)


def test_a_low_rank_product_never_takes_the_memory_of_the_whole() -> None:
    rng = np.random.default_rng(0)
    B, A = rng.normal(size=(2000, 8)), rng.normal(size=(8, 2000))
    tracemalloc.start()
    spectrum = svd_of_product(B, A)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 2000 * 2000 * 8 / 10
    np.testing.assert_allclose(spectrum.product, B @ A, rtol=0, atol=1e-11)


def test_several_products_have_the_bits_of_each_alone() -> None:
    """Of two shapes, of one whose factors are larger than the matrix, and of a zero."""
    rng = np.random.default_rng(0)
    shapes = [(40, 4, 60), (8, 6, 9), (40, 4, 60), (30, 4, 60), (40, 4, 60)]
    pairs = [(rng.normal(size=(o, n)), rng.normal(size=(n, i))) for o, n, i in shapes]
    pairs[2] = (np.zeros_like(pairs[2][0]), pairs[2][1])
    for (B, A), found in zip(pairs, svd_of_products(pairs), strict=True):
        alone = svd_of_product(B, A)
        for one, other in zip(
            (found.left, found.values, found.right),
            (alone.left, alone.values, alone.right),
            strict=True,
        ):
            np.testing.assert_array_equal(one, other)
