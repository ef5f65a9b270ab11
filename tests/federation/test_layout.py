"""One flat buffer a message: packing, unpacking, and layouts that differ."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlora.adapter import Adapter, LoraConfig, LoraLayer
from fedlora.errors import FederationError, LayerMismatchError, ShapeMismatchError
from fedlora.federation.layout import parse_segments, require_same_segments, unpack
from fedlora.flat import Segment, pack, segments_of
from tests.federation.fakes import experiment, raises, start_adapter
from tests.reference.flat import digest, with_factors

sizes = st.integers(1, 5)


@st.composite
def adapters(draw: st.DrawFn) -> Adapter:
    names = draw(st.lists(st.sampled_from("abcdef"), min_size=1, max_size=4, unique=True))
    rng = np.random.default_rng(draw(st.integers(0, 1000)))
    layers = {}
    for name in names:
        rank, width, out, conv = draw(st.tuples(sizes, sizes, sizes, st.booleans()))
        shape = (rank, width, 2) if conv else (rank, width)
        layers[f"block.{name}"] = LoraLayer(
            rng.normal(size=shape),
            rng.normal(size=(out, rank)),
            0.5,
            None,
            "conv" if conv else "linear",
        )
    return Adapter(layers, LoraConfig(rank=2))


@given(adapters())
def test_unpacking_gives_back_every_factor_bit_for_bit(adapter: Adapter) -> None:
    segments = segments_of(adapter, {"A", "B"})
    buffer = pack(adapter, segments)
    assert buffer.size == adapter.num_parameters
    zeros = adapter.map(lambda layer: replace(layer, A=layer.A * 0, B=layer.B * 0))
    assert with_factors(zeros, unpack(buffer, segments, "x")) == adapter


@given(adapters())
def test_a_layout_is_read_back_from_its_texts(adapter: Adapter) -> None:
    segments = segments_of(adapter, {"A", "B"})
    assert parse_segments([str(segment) for segment in segments], "x") == segments


def test_segments_are_sorted_by_path_with_a_before_b() -> None:
    adapter = start_adapter(experiment())
    assert [str(segment) for segment in segments_of(adapter, {"B", "A"})] == [
        "body.0.fc|A|2x6",
        "body.0.fc|B|5x2",
        "body.1.fc|A|2x5",
        "body.1.fc|B|4x2",
        "conv|A|2x3x2",
        "conv|B|6x2",
    ]
    assert str(segments_of(adapter, {"B"})[0]) == "body.0.fc|B|5x2"


def test_the_digest_covers_layout_and_numbers() -> None:
    one, other = [Segment("a", "A", (2, 3))], [Segment("a", "A", (3, 2))]
    buffer = np.arange(6, dtype=np.float32)
    assert digest(one, buffer) != digest(other, buffer)
    assert digest(one, buffer) != digest(one, buffer[::-1])


def test_a_buffer_of_another_size_is_refused() -> None:
    with raises(
        ShapeMismatchError, "client 'c1': expected a buffer of (6,) float32, found (5,) float32"
    ):
        unpack(np.zeros(5, np.float32), [Segment("a", "A", (2, 3))], "client 'c1'")
    with raises(
        ShapeMismatchError, "client 'c1': expected a buffer of (6,) float32, found (6,) float64"
    ):
        unpack(np.zeros(6), [Segment("a", "A", (2, 3))], "client 'c1'")  # type: ignore[arg-type]


EXPECTED = (Segment("fc", "A", (8, 768)), Segment("fc", "B", (10, 8)))
A, B = EXPECTED
DIFFERENCES = {
    "another rank": (
        (Segment("fc", "A", (4, 768)), B),
        ShapeMismatchError,
        "client 'c7', layer 'fc': lora_A is (4, 768), the other side has (8, 768)",
    ),
    "one that would broadcast": (
        (Segment("fc", "A", (1, 768)), B),
        ShapeMismatchError,
        "client 'c7', layer 'fc': lora_A is (1, 768), the other side has (8, 768)",
    ),
    "missing": (
        (A,),
        LayerMismatchError,
        "client 'c7', layer 'fc': lora_B is missing, the other side has (10, 8)",
    ),
    "too many": (
        (*EXPECTED, Segment("head", "A", (8, 3))),
        LayerMismatchError,
        "client 'c7', layer 'head': lora_A (8, 3) was not expected",
    ),
    "another order": (
        (B, A),
        LayerMismatchError,
        "client 'c7': the layers are right, their order or number is not",
    ),
}


@pytest.mark.parametrize("name", DIFFERENCES)
def test_a_layout_that_differs_is_refused_with_client_and_layer(name: str) -> None:
    found, error, text = DIFFERENCES[name]
    with raises(error, text):
        require_same_segments(EXPECTED, found, "client 'c7'")


@pytest.mark.parametrize(
    "text", ["", "fc", "fc|A", "|A|2x3", "fc|C|2x3", "fc|A|2x", "fc|A|-2x3", "fc|A|0x3", "fc|A|²x3"]
)
def test_a_text_that_is_no_segment_is_refused(text: str) -> None:
    with raises(
        FederationError, f"server: expected a layout of 'path|A|8x768' texts, found {text!r}"
    ):
        parse_segments([text], "server")


def test_a_size_of_thousands_of_digits_is_refused() -> None:
    with pytest.raises(FederationError, match="expected a layout"):
        parse_segments(["fc|A|" + "9" * 5000], "client 'c'")
