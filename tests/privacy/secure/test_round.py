"""The sum is the plain sum, whoever is lost, in whichever phase."""

from __future__ import annotations

import random

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from fedlora.errors import ThresholdError
from fedlora.privacy.secure import Identity
from tests.matching import raises
from tests.privacy.secure.rounds import PHASES, Round, assert_total, terms_of, vectors_of


def losing(clients: int, share: float, phase: str, seed: int = 0) -> set[int]:
    """A share of the clients, drawn for a phase."""
    draws = np.random.default_rng([seed, PHASES.index(phase)])
    return set(draws.choice(clients, int(share * clients), replace=False).tolist())


def run_and_check(terms, lost, **kind) -> Round:
    """Run all phases; who is lost in the last one has its vector in the sum."""
    vectors = vectors_of(terms)
    found = Round(terms, lost, **kind).keys().shares().masked(vectors).unmask()
    gone = set().union(*(lost.get(phase, set()) for phase in PHASES[:3]))
    assert found.errors == {}
    assert_total(found, vectors, set(range(terms.clients)) - gone)
    return found


@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("share", [0.0, 0.2, 0.4])
def test_five_clients(share, phase, bits):
    run_and_check(terms_of(5, bits=bits), {phase: losing(5, share, phase)})


@pytest.mark.parametrize(
    ("share", "phase"),
    [
        (0.0, "keys"),
        *((0.3, phase) for phase in PHASES),
        *(pytest.param(0.1, phase, marks=pytest.mark.slow) for phase in PHASES),
    ],
)
def test_fifty_clients(share, phase):
    run_and_check(terms_of(50, 31), {phase: losing(50, share, phase)})


def test_some_are_lost_in_every_phase_and_sessions_are_stored_between_them():
    lost = {"keys": {0}, "shares": {1, 7}, "masked": {4}, "unmask": {2}}
    run_and_check(terms_of(12, 7), lost, stored=True)


def test_sixty_clients_on_a_sparse_graph():
    lost = {phase: losing(60, 0.08, phase) for phase in PHASES}
    run_and_check(terms_of(60, neighbors=46), lost)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("share", "phase"), [(0.0, "keys"), *((s, p) for s in (0.1, 0.3) for p in PHASES)]
)
def test_five_hundred_clients_on_a_sparse_graph(share, phase):
    terms = terms_of(500, 300, neighbors=258)
    run_and_check(terms, {phase: losing(500, share, phase)})


@pytest.mark.parametrize("curve", [ec.SECP256R1(), ec.SECP384R1()], ids=lambda c: c.name)
def test_signed_keys(curve):
    identities = {i: Identity(ec.generate_private_key(curve)) for i in range(5)}
    run_and_check(terms_of(5), {"masked": {3}}, identities=identities)


@pytest.mark.parametrize("phase", PHASES)
def test_as_few_as_the_threshold_are_enough_and_one_fewer_is_not(phase):
    terms = terms_of(7, 4)
    run_and_check(terms, {phase: {1, 3, 5}})
    found = Round(terms, {phase: {1, 3, 5, 6}}).keys()
    with raises(ThresholdError, "4 or more", "found 3"):
        found.shares().masked(vectors_of(terms)).unmask().server.total()
    # The clients themselves refuse to reveal for as few.
    assert all(isinstance(error, ThresholdError) for error in found.errors.values())
    assert sorted(found.errors) == ([0, 2, 4] if phase in ("masked", "agree") else [])


def test_numbers_beyond_the_range_are_clipped():
    terms = terms_of(5, clipping_range=0.5)
    vectors = vectors_of(terms) * 100
    found = Round(terms).keys().shares().masked(vectors).unmask()
    assert_total(found, np.clip(vectors, -0.5, 0.5), range(5))


def test_a_client_with_too_few_holders_left_is_out_before_masks_are_put():
    terms = terms_of(60, 31, neighbors=46)
    victim, near = 9, terms.neighbors_of(9)
    # One neighbor too few is left to it, and it is left out; a draw with enough for all others.
    lost = set(random.Random(84).sample(near, len(near) - (terms.share_threshold - 2)))
    vectors = vectors_of(terms)
    found = Round(terms, {"shares": lost}).keys().shares()
    left = set(range(60)) - lost - {victim}
    assert set(found.server.survivors_of_sharing) == left
    assert_total(found.masked(vectors).unmask(), vectors, left)
