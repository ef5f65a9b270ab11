"""Rows: reading one gives what its factors one by one give, without a copy and with every check."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlora.adapter import Adapter
from fedlora.errors import NonFiniteError, ShapeMismatchError
from fedlora.federation.layout import unpack
from fedlora.flat import RowForm, RowReader, Segment, pack
from fedlora.training import Factor
from tests.federation.fakes import experiment, raises, start_adapter
from tests.federation.test_layout import adapters
from tests.reference.flat import with_factors

subsets = st.sampled_from([frozenset("A"), frozenset("B"), frozenset("AB")])


def numbers(form: RowForm, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=form.size).astype(np.float32)


@given(adapters(), subsets)
def test_a_row_gives_the_adapter_that_its_factors_give(
    like: Adapter, factors: frozenset[Factor]
) -> None:
    form = RowForm.of(like, factors)
    row = numbers(form)
    found = form.read(b"head" + row.tobytes(), 4)
    expected = with_factors(like, unpack(row, form.segments, "x"))
    assert found == expected
    assert (found.config, found.base, list(found)) == (like.config, like.base, list(like))
    assert found.ranks == expected.ranks
    for layer in found.layers.values():
        assert layer.A.dtype == layer.B.dtype == np.float32
        assert not layer.A.flags.writeable
        assert not layer.B.flags.writeable


@given(adapters(), subsets)
def test_a_reader_gives_back_the_row_that_an_adapter_was_made_of(
    like: Adapter, factors: frozenset[Factor]
) -> None:
    reader, form = RowReader(like, factors), RowForm.of(like, factors)
    data = numbers(form).tobytes()
    found = form.read(data)
    assert np.array_equal(reader(found), np.frombuffer(data, np.float32))
    assert np.shares_memory(reader(found), np.frombuffer(data, np.float32))
    # One that was changed since, or never was a row, is joined from its factors.
    doubled = found.map(lambda layer: replace(layer, B=layer.B * 2))
    assert np.array_equal(reader(doubled), pack(doubled, form.segments))
    assert np.array_equal(reader(like), pack(like, form.segments))


def test_a_reader_of_one_factor_does_not_take_a_row_of_both() -> None:
    like = start_adapter(experiment())
    form = RowForm.of(like, {"A", "B"})
    found = form.read(numbers(form).tobytes())
    reader = RowReader(like, {"B"})
    assert np.array_equal(reader(found), pack(found, reader.segments))
    assert reader(found).size == sum(layer.B.size for layer in like.layers.values())


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_number_that_is_not_finite_is_refused_with_its_place(bad: float) -> None:
    form = RowForm.of(start_adapter(experiment()), {"B"})
    row = numbers(form)
    row[3] = bad
    with raises(NonFiniteError, f"B: expected finite numbers, found {bad} at (1, 1) and 0 more"):
        form.read(row.tobytes())


def test_large_numbers_whose_squares_overflow_are_finite() -> None:
    form = RowForm.of(start_adapter(experiment()), {"A", "B"})
    row = np.full(form.size, 3e38, np.float32)
    assert np.array_equal(pack(form.read(row.tobytes()), form.segments), row)


def test_a_row_that_is_too_short_is_refused() -> None:
    form = RowForm.of(start_adapter(experiment()), {"A"})
    with pytest.raises(ValueError, match="buffer is smaller than requested size"):
        form.read(bytes(4 * form.size - 1))


def test_packing_a_factor_of_another_shape_is_refused() -> None:
    with raises(ShapeMismatchError, "conv|A|2x9: the adapter has no such factor"):
        pack(start_adapter(experiment()), [Segment("conv", "A", (2, 9))])
