"""Codecs of one row: the slow twin, the bounds of their errors, and bytes that no encoder makes."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.errors import FormatError, NonFiniteError
from fedlora.federation.codecs import (
    CODECS,
    FP32,
    SERVER,
    Codecs,
    RowCodec,
    agreed,
    rounding,
)
from fedlora.flat import Segment
from fedlora.randomness import rng
from tests.reference import codecs as slow

CODED = [codec for codec in CODECS if codec != FP32]
INTEGER = {"int8": 127, "int4": 7}
SEGMENTS = (
    Segment("body.0.fc", "A", (3, 7)),
    Segment("body.0.fc", "B", (5, 3)),
    Segment("body.0.fc", "magnitude", (5,)),
    Segment("conv", "A", (2, 3, 3, 1)),
    Segment("conv", "B", (4, 2)),
)
SIZE = sum(segment.size for segment in SEGMENTS)


def numbers(segments: tuple[Segment, ...] = SEGMENTS, seed: int = 0) -> np.ndarray:
    """A row whose components are of very different sizes, one of them zero."""
    row = np.random.default_rng(seed).normal(size=sum(s.size for s in segments))
    places, _ = slow.components(segments)
    for number, component in enumerate(places):
        row[component] *= [1.0, 1e-6, 0.0, 300.0][number % 4]
    return row.astype(np.float32)


def steps(row: np.ndarray, codec: str, segments: tuple[Segment, ...] = SEGMENTS) -> np.ndarray:
    """The scale of every number's component; 0 for the magnitudes, which are exact."""
    found = np.zeros(len(row))
    for component in slow.components(segments)[0]:
        found[component] = slow.scale_of(float(np.abs(row[component]).max()), INTEGER[codec])
    return found


@settings(deadline=None, max_examples=25)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["A", "B", "magnitude"]), st.integers(1, 4), st.integers(1, 5)
        ),
        max_size=4,
    ),
    st.sampled_from(CODED),
    st.integers(0, 2**32),
    st.booleans(),
)  # fmt: skip
def test_bytes_and_rows_are_those_of_the_slow_twin(
    shapes: list[tuple[str, int, int]], codec: str, seed: int, drawn: bool
) -> None:
    segments = tuple(
        Segment(f"layer{i}", factor, (one,) if factor == "magnitude" else (one, two))  # type: ignore[arg-type]
        for i, (factor, one, two) in enumerate(shapes)
    )
    row, fast = numbers(segments, seed), RowCodec(segments, codec)  # type: ignore[arg-type]
    data = fast.encode(row, rng(seed, "draws") if drawn else None)
    assert data == slow.encode(segments, row, codec, rng(seed, "draws") if drawn else None)
    assert len(data) == fast.num_bytes
    np.testing.assert_array_equal(fast.decode(data), slow.decode(segments, data, codec))


@pytest.mark.parametrize("codec", INTEGER)
def test_the_mean_over_many_draws_is_the_number_itself(codec: str) -> None:
    row, coder, count = numbers(), RowCodec(SEGMENTS, codec), 1000  # type: ignore[arg-type]
    draws = rng(0, "unbiased")
    mean = sum(coder.decode(coder.encode(row, draws)).astype(float) for _ in range(count)) / count
    step = steps(row, codec)
    # One draw's deviation is at most half a step: the mean's is half a step / sqrt(count), and of
    # 59 numbers none is beyond five times that by chance (3e-5). Plus float32's own rounding.
    bound = 5 * 0.5 * step / np.sqrt(count) + 1e-6 * np.abs(row)
    assert (np.abs(mean - row) <= bound).all()
    # What rounding to nearest would be off by, always to the same side.
    nearest = coder.decode(coder.encode(row))
    assert (np.abs(nearest - row) > 2 * bound).any()


@pytest.mark.parametrize("codec", INTEGER)
def test_no_number_is_off_by_a_step(codec: str) -> None:
    row, coder = numbers(), RowCodec(SEGMENTS, codec)  # type: ignore[arg-type]
    step, slack = steps(row, codec), 1e-6 * np.abs(row)  # float32's rounding of the product
    for seed in range(50):
        error = np.abs(coder.decode(coder.encode(row, rng(seed, "draws"))) - row)
        assert (error <= step + slack).all()
    assert (np.abs(coder.decode(coder.encode(row)) - row) <= step / 2 + slack).all()
    # A component of zeros stays zero, and so does a zero beside other numbers.
    lonely = np.zeros(SIZE, np.float32)
    lonely[0] = 1
    found = coder.decode(coder.encode(lonely, rng(0, "draws")))
    assert np.flatnonzero(found).tolist() == [0]


def test_half_precision_is_off_by_half_its_last_place() -> None:
    coder = RowCodec(SEGMENTS, "fp16")
    row = numbers()
    error = np.abs(coder.decode(coder.encode(row)) - row)
    assert (error <= np.maximum(np.abs(row) * 2.0**-11, 2.0**-25)).all()


def test_the_extremes_of_float32_are_held() -> None:
    # Subnormal numbers and scales, and numbers near the largest.
    unit = numbers().astype(float)
    for size in (1e-45, 1e-38, 3.3e38):
        row = (unit / np.abs(unit).max() * size).astype(np.float32)
        for codec in INTEGER:
            coder = RowCodec(SEGMENTS, codec)  # type: ignore[arg-type]
            error = np.abs(coder.decode(coder.encode(row, rng(0, "draws"))) - row.astype(float))
            assert (error <= steps(row, codec) + 1e-6 * np.abs(row)).all()


@pytest.mark.parametrize("codec", CODED)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_number_that_is_not_finite_is_not_encoded(codec: str, bad: float) -> None:
    row = numbers()
    row[25] = bad
    with pytest.raises(NonFiniteError, match=r"^layer 'body.0.fc', B: expected finite numbers"):
        RowCodec(SEGMENTS, codec).encode(row, rng(0, "draws"))  # type: ignore[arg-type]


def test_a_number_over_the_largest_half_is_refused() -> None:
    row = numbers()
    row[0] = 65520
    with pytest.raises(NonFiniteError, match=r"codec fp16 holds numbers up to 65504, found 6\.55"):
        RowCodec(SEGMENTS, "fp16").encode(row)


def _scale(value: float) -> bytes:
    return np.float32(value).tobytes()


@pytest.mark.parametrize(
    ("codec", "place", "data", "text"),
    [
        ("int8", 0, _scale(np.nan), "scales: expected finite numbers >= 0"),
        ("int8", 4, _scale(np.inf), "scales: expected finite numbers >= 0"),
        ("int4", 8, _scale(-1.0), "scales: expected finite numbers >= 0"),
        ("int8", -1, b"\x80", "int8: expected integers from -127 on"),
        ("int4", -2, b"\x08", "int4: expected integers from -7 on"),
        ("int4", -1, b"\x11", "int4: expected zero in the half byte after the last value"),
    ],
)
def test_bytes_that_no_encoder_makes_are_refused(
    codec: str, place: int, data: bytes, text: str
) -> None:
    segments = (Segment("fc", "A", (3, 5)),)
    coder = RowCodec(segments, codec)  # type: ignore[arg-type]
    made = bytearray(coder.encode(numbers(segments)))
    place %= len(made)
    made[place : place + len(data)] = data
    with pytest.raises(FormatError, match=f"^{text}$"):
        coder.decode(bytes(made))
    with pytest.raises(FormatError, match=f"^{codec}: expected {coder.num_bytes} bytes, found 1$"):
        coder.decode(b"0")


def test_a_layout_alone_allocates_nothing_of_its_size() -> None:
    huge = tuple(Segment(f"l{i}", "A", (1 << 15, 1 << 15)) for i in range(64))
    tracemalloc.start()
    try:
        coder = RowCodec(huge, "int4")
        with pytest.raises(FormatError, match="int4: expected 34368126976 bytes, found 10"):
            coder.decode(bytes(10))
        assert tracemalloc.get_traced_memory()[1] < 1 << 16
    finally:
        tracemalloc.stop()


def test_draws_are_keyed_by_seed_client_and_round() -> None:
    row, coder = numbers(), RowCodec(SEGMENTS, "int8")
    keys = [(0, "c1", 1), (1, "c1", 1), (0, "c2", 1), (0, "c1", 2), (0, SERVER, 1)]
    found = [coder.encode(row, rounding("int8", *key)) for key in keys]
    assert len(set(found)) == len(keys)
    assert found[0] == coder.encode(row, rounding("int8", *keys[0]))
    assert rounding("fp16", 0, "c1", 1) is None


@pytest.mark.parametrize(
    ("known", "found"),
    [
        (CODECS, Codecs("int8", "fp16")),
        (("fp32", "int8"), Codecs("int8", "fp32")),
        (("fp16",), Codecs("fp32", "fp16")),
        (("fp32",), Codecs()),
        ((), Codecs()),
        (("int9",), Codecs()),
    ],
)
def test_what_a_client_does_not_know_travels_in_fp32(known: tuple[str, ...], found: Codecs) -> None:
    assert agreed(Codecs("int8", "fp16"), known) == found
