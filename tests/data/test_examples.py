"""Examples are immutable; batches are keyed, exact in number, and bounded in padding."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.data import IGNORED, Examples, collate, draw_batches, eval_batches
from fedlora.errors import ConfigError, DataError
from fedlora.training import TrainConfig


def numbered(count: int) -> Examples:
    """Features that name their row."""
    return Examples(np.arange(count, dtype=np.float32)[:, None], np.arange(count))


def text(lengths: list[int]) -> Examples:
    """Rows of token ids 1, of these lengths, whose first target names the row."""
    width = max(lengths, default=1)
    used = np.arange(width) < np.array(lengths, np.int64)[:, None]
    targets = np.where(used, 7, IGNORED)
    targets[:, 0] = np.arange(len(lengths))
    return Examples(used.astype(np.int64), targets, used, np.array(lengths))


def rows(batches: object) -> list[list[int]]:
    return [batch["targets"].tolist() for batch in batches]  # type: ignore[attr-defined]


def test_examples_copy_what_could_still_be_written() -> None:
    inputs = np.ones((2, 3), np.float32)
    examples = Examples(inputs, np.zeros(2, np.int64))
    inputs[:] = 5
    assert examples.inputs.tolist() == [[1, 1, 1], [1, 1, 1]]
    with pytest.raises(ValueError, match="read-only"):
        examples.targets[0] = 1


def test_features_become_float32_and_ids_int64() -> None:
    examples = Examples(np.ones((2, 3)), np.zeros(2, np.int32))
    assert examples.inputs.dtype == np.float32
    assert examples.targets.dtype == np.int64
    assert Examples(np.ones((2, 3), np.int32), np.zeros(2, int)).inputs.dtype == np.int64


REFUSED = [
    ({"inputs": np.ones(3), "targets": np.ones(3, int)}, "2 dimensions or more"),
    ({"inputs": np.ones((3, 2)), "targets": np.ones(2, int)}, "expected 3 targets"),
    ({"inputs": np.ones((3, 2), int), "targets": np.ones((3, 4), int)}, r"expected \(3, 2\)"),
    ({"inputs": np.array([["a"]]), "targets": np.ones(1, int)}, "found dtype <U1"),
    ({"inputs": np.array([[0.0], [np.nan]]), "targets": np.ones(2, int)}, "in row 1"),
    (
        {
            "inputs": np.ones((1, 2), int),
            "targets": np.ones((1, 2), int),
            "word_starts": np.ones((1, 1), bool),
        },
        "word_starts: expected",
    ),
]


@pytest.mark.parametrize(("arrays", "found"), REFUSED)
def test_arrays_that_do_not_go_together_are_refused(
    arrays: dict[str, np.ndarray], found: str
) -> None:
    with pytest.raises(DataError, match=found):
        Examples(**arrays)


def test_collate_cuts_text_to_the_longest_chosen_row() -> None:
    batch = collate(text([1, 5, 3]), [2, 0])
    assert batch["inputs"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["targets"].tolist() == [[2, 7, 7], [0, IGNORED, IGNORED]]
    assert batch["word_starts"].tolist() == [[True, True, True], [True, False, False]]
    assert batch["inputs"].flags.writeable


def test_length_of_text_to_classify_ends_at_its_last_token_that_is_not_0() -> None:
    examples = Examples(np.array([[0, 4, 0, 5, 0], [0, 0, 0, 0, 0]]), np.zeros(2, int))
    assert examples.lengths.tolist() == [4, 1]


def test_draw_batches_gives_these_golden_values() -> None:
    steps = TrainConfig(local_steps=4, batch_size=3)
    assert rows(draw_batches(numbered(5), steps, 0, "alice", 1)) == GOLDEN_STEPS
    epochs = TrainConfig(local_epochs=2, batch_size=3)
    assert rows(draw_batches(numbered(5), epochs, 0, "alice", 1)) == GOLDEN_EPOCHS


GOLDEN_STEPS = [[0, 3, 1], [2, 4, 2], [4, 1, 3], [0, 4, 1]]
GOLDEN_EPOCHS = [[0, 3, 1], [2, 4], [2, 4, 1], [3, 0]]


@pytest.mark.parametrize("other", [(1, "alice", 1), (0, "bob", 1), (0, "alice", 2)])
def test_seed_client_and_round_each_change_the_batches(other: tuple[int, str, int]) -> None:
    config = TrainConfig(local_steps=2, batch_size=8)
    first = rows(draw_batches(numbered(50), config, 0, "alice", 1))
    assert rows(draw_batches(numbered(50), config, *other)) != first
    assert rows(draw_batches(numbered(50), config, 0, "alice", 1)) == first


@given(
    count=st.integers(0, 40),
    size=st.integers(1, 12),
    steps=st.integers(0, 9),
    use_epochs=st.booleans(),
)
def test_batches_are_as_many_as_the_config_says_and_use_examples_evenly(
    count: int, size: int, steps: int, use_epochs: bool
) -> None:
    config = TrainConfig(
        local_epochs=steps if use_epochs else None,
        local_steps=None if use_epochs else steps,
        batch_size=size,
    )
    batches = rows(draw_batches(numbered(count), config, 0, "c", 1))
    assert len(batches) == config.steps_for(count)
    uses = np.bincount([row for batch in batches for row in batch], minlength=count)
    if use_epochs:
        assert uses.tolist() == [steps] * count if count else True
    elif batches:
        assert {len(batch) for batch in batches} == {min(size, count)}
        assert uses.max() - uses.min() <= 1


@settings(max_examples=60)
@given(lengths=st.lists(st.integers(1, 30), max_size=40), limit=st.integers(1, 90))
def test_eval_batches_hold_every_example_once_and_bound_their_size(
    lengths: list[int], limit: int
) -> None:
    examples = text(lengths)
    seen: list[int] = []
    for batch in eval_batches(examples, limit):
        size, width = batch["inputs"].shape
        assert size * width <= limit or size == 1
        seen.extend(batch["targets"][:, 0].tolist())
    assert sorted(seen) == list(range(len(lengths)))
    assert [lengths[row] for row in seen] == sorted(lengths)


def test_eval_batches_count_time_steps_of_a_series_and_1_for_a_vector() -> None:
    series = Examples(np.ones((4, 6, 100), np.float32), np.zeros(4, int))
    assert [len(b["inputs"]) for b in eval_batches(series, 200)] == [2, 2]
    assert [len(b["inputs"]) for b in eval_batches(numbered(5), 3)] == [3, 2]


def test_eval_batches_refuse_a_limit_of_0() -> None:
    with pytest.raises(ConfigError, match="max_tokens: expected a whole number >= 1, found 0"):
        list(eval_batches(numbered(1), 0))
