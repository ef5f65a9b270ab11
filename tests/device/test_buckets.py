"""Batches of any size in graphs of fixed sizes: what is in the pieces adds up to the batch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import fedlora as fl
from fedlora.device.buckets import Piece, pieces_of
from fedlora.device.manifest import GraphInfo, Manifest
from fedlora.errors import ConfigError, DataError
from fedlora.targets import LayerSpec
from tests.matching import raises

TEXT = Manifest(
    base="ab" * 32, base_id="a", task="next-token",
    layers={"a": LayerSpec("linear", (4,), 3)}, lora=fl.LoraConfig(rank=2),
    graphs={
        "train_6x16.onnx": GraphInfo("train", 6, 16),
        "train_8x4.onnx": GraphInfo("train", 8, 4),
        "infer.onnx": GraphInfo("infer"),
        "train_8x8.onnx": GraphInfo("train", 8, 8),
    },
    files={}, outputs=50,
)  # fmt: skip
FIXED = replace(
    TEXT, task="classification", input_dtype="float32", input_shape=(3, 2), outputs=5,
    graphs={"train_4.onnx": GraphInfo("train", 4), "train_16.onnx": GraphInfo("train", 16)},
)  # fmt: skip


def texts(lengths: list[int], width: int | None = None) -> dict[str, np.ndarray[Any, Any]]:
    """Rows of token ids from 1 on, of these many counted targets each."""
    shape = len(lengths), width or max(lengths)
    inputs, targets = np.zeros(shape, np.int64), np.full(shape, -100)
    for row, length in enumerate(lengths):
        inputs[row, :length] = row + 1
        targets[row, :length] = (row + np.arange(length)) % 50
    return {"inputs": inputs, "targets": targets}


def shape(piece: Piece) -> tuple[str, int]:
    """A piece's graph and how many rows of it are used."""
    return piece.graph, int((piece.targets != -100).reshape(len(piece.targets), -1).any(1).sum())


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [
        ([3, 2], [("train_8x4.onnx", 2)]),
        ([4] * 8, [("train_8x4.onnx", 8)]),
        ([5, 2, 8], [("train_8x8.onnx", 3)]),
        ([9], [("train_6x16.onnx", 1)]),
        ([16, 3, 4, 2], [("train_6x16.onnx", 4)]),
        ([16, *[3] * 8], [("train_8x4.onnx", 3), ("train_6x16.onnx", 6)]),
        ([1] * 9, [("train_8x4.onnx", 1), ("train_8x4.onnx", 8)]),
        ([16] * 7, [("train_6x16.onnx", 1), ("train_6x16.onnx", 6)]),
    ],
)
def test_the_cheapest_graphs_are_taken(lengths: list[int], expected: list[Any]) -> None:
    assert [shape(piece) for piece in pieces_of(texts(lengths), TEXT)] == expected


@given(st.lists(st.integers(0, 16), min_size=1, max_size=40))
def test_every_counted_target_is_in_one_piece_once(lengths: list[int]) -> None:
    batch = texts(lengths, 16)
    pieces = pieces_of(batch, TEXT)
    found = []
    for piece in pieces:
        graph = TEXT.graphs[piece.graph]
        assert piece.inputs.shape == piece.targets.shape == (graph.rows, graph.positions)
        counted = piece.targets != -100
        found += list(zip(piece.inputs[counted], piece.targets[counted], strict=True))
        assert piece.weight == pytest.approx(counted.sum() / sum(lengths))
    counted = batch["targets"] != -100
    expected = list(zip(batch["inputs"][counted], batch["targets"][counted], strict=True))
    assert sorted(found) == sorted(expected)
    assert sum(piece.weight for piece in pieces) == pytest.approx(1.0 if sum(lengths) else 0.0)


def test_rows_to_fill_up_are_copies_that_are_not_counted() -> None:
    """Zeros in every place of a row might be NaN in a model."""
    (piece,) = pieces_of(texts([3, 2]), TEXT)
    assert (piece.targets[2:] == -100).all()
    np.testing.assert_array_equal(piece.inputs[2:], np.tile(piece.inputs[0], (6, 1)))
    assert (piece.inputs[:, 3:] == 0).all()


def test_a_text_that_is_classified_reaches_to_its_last_token() -> None:
    one_each = replace(TEXT, task="classification", outputs=4)
    ids = np.array([[5, 6, 7, 8, 9, 0, 0], [5, 0, 0, 0, 0, 0, 0]])
    (piece,) = pieces_of({"inputs": ids, "targets": np.array([3, 1])}, one_each)
    assert piece.graph == "train_8x8.onnx"
    assert piece.targets.tolist() == [1, 3, *[-100] * 6]
    assert piece.inputs[1].tolist() == [5, 6, 7, 8, 9, 0, 0, 0]


def test_features_of_a_fixed_shape_fill_rows_only() -> None:
    inputs = np.random.default_rng(0).normal(size=(18, 3, 2)).astype(np.float32)
    batch = {"inputs": inputs, "targets": np.arange(18) % 5}
    pieces = pieces_of(batch, FIXED)
    assert [shape(piece) for piece in pieces] == [("train_4.onnx", 2), ("train_16.onnx", 16)]
    np.testing.assert_array_equal(np.concatenate([pieces[0].inputs[:2], pieces[1].inputs]), inputs)
    assert [piece.weight for piece in pieces] == pytest.approx([2 / 18, 16 / 18])


def test_a_row_longer_than_every_graph_says_what_to_export() -> None:
    text = (
        "a row has 17 tokens, and this bundle's train graphs take rows of up to 16; export it "
        "again with a train graph of longer rows, as --train 2x32, or cut the texts (max_length)"
    )
    with raises(ConfigError, text):
        pieces_of(texts([17, 2]), TEXT)


@pytest.mark.parametrize(("manifest", "form"), [(TEXT, "8x32"), (FIXED, "16")])
def test_a_bundle_for_inference_only_cannot_train(manifest: Manifest, form: str) -> None:
    inputs = np.ones((1, 3, 2), np.float32) if manifest is FIXED else np.ones((1, 2), np.int64)
    targets = np.ones(1 if manifest is FIXED else (1, 2), np.int64)
    text = (
        "this bundle has no train graph and can only be used for inference; export it again with "
        f"--train {form}"
    )
    with raises(ConfigError, text):
        pieces_of({"inputs": inputs, "targets": targets}, replace(manifest, graphs={}))


@pytest.mark.parametrize(
    ("manifest", "inputs", "targets", "text"),
    [
        (
            FIXED, np.ones((2, 3, 3), np.float32), np.zeros(2, int),
            "a batch's inputs: expected (rows, 3, 2) float32, found (2, 3, 3) float32",
        ),
        (
            TEXT, np.ones((2, 3), np.float32), np.zeros((2, 3), int),
            "a batch's inputs: expected (rows, tokens) int64, found (2, 3) float32",
        ),
        (
            TEXT, np.ones((2, 3), int), np.zeros(2, int),
            "a batch's targets: expected (2, 3) int64, found (2,) int64",
        ),
        (
            TEXT, np.ones((1, 2), int), np.array([[1, 50]]),
            "a batch's targets: expected 0 to 49, or -100 where not counted, found 50",
        ),
        (
            TEXT, np.ones((1, 2), int), np.array([[-1, 2]]),
            "a batch's targets: expected 0 to 49, or -100 where not counted, found -1",
        ),
        (
            TEXT, np.array([[3, -1]]), np.array([[1, 2]]),
            "a batch's inputs: expected token ids >= 0, found -1",
        ),
    ],
)  # fmt: skip
def test_a_batch_of_another_kind_is_refused(
    manifest: Manifest, inputs: Any, targets: Any, text: str
) -> None:
    with raises(DataError, text):
        pieces_of({"inputs": inputs, "targets": targets}, manifest)
