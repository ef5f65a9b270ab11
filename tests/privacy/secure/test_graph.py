"""The sparse graph: its shape, its odds against simulation, and the sparse ones it refuses."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from fedlora.errors import SecureTermsError
from fedlora.privacy.secure.graph import (
    FAILURE,
    fewest_neighbors,
    odds,
    ring_neighbors,
    share_threshold,
    tail,
)
from tests.matching import raises
from tests.privacy.secure.rounds import terms_of


@settings(max_examples=40, deadline=None)
@given(clients=st.integers(4, 60), data=st.data())
def test_neighbors_are_mutual_and_as_many_as_asked(clients, data):
    neighbors = 2 * data.draw(st.integers(1, (clients - 2) // 2))
    near = [set(ring_neighbors("r", 1, clients, neighbors, i)) for i in range(clients)]
    assert {len(others) for others in near} == {neighbors}
    assert all(i in near[j] for i in range(clients) for j in near[i])
    assert all(i not in near[i] for i in range(clients))


def test_a_round_and_a_run_have_rings_of_their_own():
    rings = [ring_neighbors(run, round, 100, 6, 0) for run in ("a", "b") for round in range(20)]
    # The same six of 99 twice: 1e-9 a pair.
    assert len({tuple(ring) for ring in rings}) == len(rings)


def test_the_ring_is_the_same_on_every_machine():
    # As this version first gave it: devices of other versions must come to the same.
    assert ring_neighbors("run", 7, 20, 4, 3) == [2, 5, 14, 16]


@settings(max_examples=60, deadline=None)
@given(everyone=st.integers(1, 60), data=st.data())
def test_the_tail_is_the_hypergeometric_one(everyone, data):
    marked = data.draw(st.integers(0, everyone))
    draws = data.draw(st.integers(0, everyone))
    least = data.draw(st.integers(-1, everyone + 1))
    # SciPy's own sum of logarithms is good to about 1e-10.
    expected = stats.hypergeom.sf(least - 1, everyone, marked, draws)
    assert math.isclose(tail(everyone, marked, draws, least), expected, rel_tol=1e-8, abs_tol=1e-14)


def test_the_chosen_threshold_keeps_all_three_odds_and_is_the_smallest_that_does():
    for clients in (60, 200, 500):
        neighbors = fewest_neighbors(clients)
        threshold = share_threshold(clients, neighbors)
        assert 2 * threshold > neighbors + 1
        found = odds(clients, neighbors, threshold)
        assert max(found.lost, found.both, found.apart) <= FAILURE
        below = odds(clients, neighbors, threshold - 1)
        assert max(below.both, below.apart) > FAILURE
        with raises(SecureTermsError, f"{neighbors} or more", f"found {neighbors - 2}"):
            share_threshold(clients, neighbors - 2)


def test_terms_refuse_a_sparse_graph_that_would_fail():
    fewest = fewest_neighbors(500)
    with raises(SecureTermsError, f"neighbors: expected {fewest} or more for 500 clients"):
        terms_of(500, neighbors=20)
    assert terms_of(500, neighbors=fewest).share_threshold == share_threshold(500, fewest)


@pytest.mark.parametrize("clients", [4, 8, 12])
def test_for_few_clients_only_everyone_is_enough(clients):
    with raises(SecureTermsError, f"all of {clients} clients", "leave out neighbors"):
        terms_of(clients, neighbors=2)


def test_the_odds_of_losing_too_many_holders_bound_what_happens():
    # A graph far too sparse, so that failures are there to be counted.
    clients, neighbors, threshold, tries = 60, 12, 8, 400
    lost = math.ceil(0.3 * clients)
    draws = np.random.default_rng(0)
    near = [ring_neighbors("r", 0, clients, neighbors, i) for i in range(clients)]
    failed = 0
    for _ in range(tries):
        gone = set(draws.choice(clients, lost, replace=False).tolist())
        failed += any(len(set(others) - gone) < threshold for others in near)
    bound = odds(clients, neighbors, threshold).lost
    # The union bound holds for the true rate, from which the count is off by a few deviations.
    assert 0 < failed / tries <= bound + 4 * 0.5 / tries**0.5
    # A single neighborhood's rate is exact, not only a bound.
    alone = sum(
        len(set(near[0]) - set(draws.choice(clients, lost, replace=False).tolist())) < threshold
        for _ in range(4000)
    )
    exact = stats.hypergeom.cdf(threshold - 1, clients - 1, clients - 1 - lost, neighbors)
    # Client 0 may be among the lost here: the two rates are 5 % apart, and 4 deviations.
    assert abs(alone / 4000 - exact) < 0.05 * exact + 4 * (exact / 4000) ** 0.5


def test_a_gap_that_parts_the_ring_leaves_a_client_at_its_edge_without_enough_holders():
    # All ways to lose clients of a small ring: parted means someone cannot be opened.
    clients, neighbors = 14, 4
    threshold = neighbors // 2 + 2
    near = [set(ring_neighbors("r", 0, clients, neighbors, i)) for i in range(clients)]
    parted = 0
    for gone in itertools.chain.from_iterable(
        itertools.combinations(range(clients), count) for count in range(2, 9)
    ):
        left = set(range(clients)) - set(gone)
        reached, edge = set(), {min(left)}
        while edge:
            reached |= edge
            edge = set().union(*(near[i] for i in edge)) & left - reached
        if reached != left:
            parted += 1
            for group in (reached, left - reached):
                assert any(len((near[i] | {i}) & left) < threshold for i in group)
    assert parted > 0
