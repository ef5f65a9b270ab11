"""Every example goes to exactly one client, whatever the skew."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.data import (
    Examples,
    FederatedData,
    dirichlet_partition,
    group_partition,
    iid_partition,
    load_data,
)
from fedlora.data.partition import repartitioned
from fedlora.errors import ConfigError, DataError, UnknownNameError


def used_once(parts: list[np.ndarray], count: int) -> bool:
    return sorted(np.concatenate(parts).tolist()) == list(range(count))


@given(clients=st.integers(1, 20), extra=st.integers(0, 60), seed=st.integers(0, 5))
def test_iid_uses_every_example_once_and_sizes_differ_by_one(
    clients: int, extra: int, seed: int
) -> None:
    parts = iid_partition(clients + extra, clients, seed)
    assert used_once(parts, clients + extra)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


@settings(max_examples=80)
@given(
    labels=st.lists(st.integers(0, 5), min_size=30, max_size=120),
    clients=st.integers(1, 10),
    alpha=st.sampled_from([1e-6, 1e-3, 0.1, 1.0, 100.0]),
    least=st.integers(0, 3),
)
def test_dirichlet_uses_every_example_once_and_keeps_the_minimum(
    labels: list[int], clients: int, alpha: float, least: int
) -> None:
    parts = dirichlet_partition(labels, clients, alpha, 0, least)
    assert used_once(parts, len(labels))
    assert min(map(len, parts)) >= least


def test_dirichlet_is_the_more_skewed_the_smaller_alpha_is() -> None:
    labels = np.repeat(np.arange(4), 500)

    def largest_share(alpha: float) -> float:
        parts = dirichlet_partition(labels, 8, alpha, 0)
        counts = [np.bincount(labels[part], minlength=4) for part in parts]
        return float(np.mean([c.max() / c.sum() for c in counts]))

    assert largest_share(0.05) > 0.85
    assert largest_share(1000) < 0.3


def test_dirichlet_gives_two_parts_the_same_proportions() -> None:
    train, test = np.repeat(np.arange(3), 1000), np.repeat(np.arange(3), 100)
    for one, other in zip(
        dirichlet_partition(train, 5, 0.5, 3), dirichlet_partition(test, 5, 0.5, 3), strict=True
    ):
        shares = np.bincount(train[one], minlength=3) / 1000
        # Both are rounded to whole examples: 1 of 100 is the coarser one.
        assert np.allclose(shares, np.bincount(test[other], minlength=3) / 100, atol=0.011)


def test_too_few_examples_are_refused() -> None:
    text = "expected at least 6 examples for 3 clients of 2 or more, found 5; ask for fewer"
    with pytest.raises(DataError, match=text):
        dirichlet_partition([0] * 5, 3, 1.0, 0, 2)


@pytest.mark.parametrize("alpha", [0, -1, float("nan"), float("inf")])
def test_alpha_has_to_be_a_finite_number_over_0(alpha: float) -> None:
    with pytest.raises(ConfigError, match="alpha: expected a finite number > 0"):
        dirichlet_partition([0, 1], 1, alpha, 0)


def test_groups_are_clients_of_their_own() -> None:
    parts = group_partition(["b", "a", "b"])
    assert {name: rows.tolist() for name, rows in parts.items()} == {"a": [1], "b": [0, 2]}


def test_repartitioned_data_keeps_train_and_test_apart() -> None:
    data = load_data("watch")
    dealt = load_data("watch", partition="dirichlet", alpha=0.05, clients=30)
    for part in ("train", "test"):
        old = [getattr(client, part) for client in data.clients()]
        new = [getattr(client, part) for client in dealt.clients()]
        assert _bytes(old) == _bytes(new)
    assert min(len(client.train) for client in dealt.clients()) >= 1
    assert dealt.notes[0] == (
        "the examples of 10 clients were pooled and dealt out to 30: dirichlet with alpha 0.05"
    )
    without = sum(len(client.test) == 0 for client in dealt.clients())
    assert dealt.notes[1] == f"{without} of 30 clients have no test examples"


def test_dirichlet_needs_labels(small_text: FederatedData) -> None:
    with pytest.raises(ConfigError, match="'dirichlet' needs labels"):
        repartitioned(small_text, "dirichlet", 0.5, 2, 0)


def test_repartitioned_text_is_padded_to_the_widest(small_text: FederatedData) -> None:
    dealt = repartitioned(small_text, "iid", 0.5, 2, 0)
    tokens = sum(int((c.train.targets != -100).sum()) for c in dealt.clients())
    assert tokens == sum(int((c.train.targets != -100).sum()) for c in small_text.clients())


def test_an_unknown_partition_is_refused() -> None:
    with pytest.raises(UnknownNameError, match="unknown partition 'dirichle'; did you mean"):
        load_data("watch", partition="dirichle")


def test_alpha_stands_behind_the_name() -> None:
    dealt = load_data("watch", partition="dirichlet:0.05", clients=30)
    assert dealt.notes == load_data("watch", partition="dirichlet", alpha=0.05, clients=30).notes
    with pytest.raises(ConfigError, match="expected a number after 'dirichlet:', found 'x'"):
        load_data("watch", partition="dirichlet:x")
    with pytest.raises(UnknownNameError, match="unknown partition 'iid:3'"):
        load_data("watch", partition="iid:3")


def _bytes(parts: list[Examples]) -> list[bytes]:
    return sorted(row.tobytes() for part in parts for row in part.inputs)
