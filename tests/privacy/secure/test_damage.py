"""One byte of any message is changed: someone refuses it, and no sum is silently another.

The exception is the masked vector, which nothing but the transport protects: any ring number is as
good as any other. A changed count is noticed always, and a changed number where it leaves what that
many clients can add up to; else that one number of the sum is wrong, and no other.
"""

from __future__ import annotations

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.errors import SecureAggregationError, SecureSumError, ShareError
from fedlora.privacy.secure import Advertisement, ClientSession, Identity, Terms
from fedlora.privacy.secure.shares import MESSAGE_BYTES
from tests.matching import raises
from tests.privacy.secure.rounds import Round, assert_total, terms_of, vectors_of

TERMS = terms_of(5, 3, size=4)
VECTORS = vectors_of(TERMS)
IDENTITIES = {i: Identity(ec.generate_private_key(ec.SECP256R1())) for i in range(5)}
PLACES = st.integers(0, 10_000)
FLIPS = st.integers(1, 255)


def flipped(data: bytes, place: int, flip: int) -> bytes:
    """The bytes with one of them changed."""
    changed = bytearray(data)
    changed[place % len(data)] ^= flip
    return bytes(changed)


def on_the_way(kind: str, place: int, flip: int, found: Round) -> None:
    """Run a round in which one message of or to client 1 is damaged."""

    def of_one(index, value):
        return flipped(value, place, flip) if index == 1 else value

    def one_of(index, values):
        other = place % len(values)
        key = sorted(values)[other]
        return values | {key: flipped(values[key], place, flip)} if index == 1 else values

    def ad_of_another(index, ads):
        if index != 1:
            return ads
        data = flipped(ads[2].to_bytes(), place, flip)
        return ads | {2: Advertisement.from_bytes(data)}

    found.keys(*[of_one] * (kind == "keys"))
    keep = lambda index, value: value  # noqa: E731
    found.shares(
        one_of if kind == "shares up" else keep, ad_of_another if kind == "directory" else keep
    )
    found.masked(VECTORS, *[one_of] * (kind == "shares down"))
    found.unmask(*[one_of] * (kind == "revealed"))


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("kind", ["keys", "directory", "shares up", "shares down", "revealed"])
@settings(max_examples=12, deadline=None)
@given(place=PLACES, flip=FLIPS)
def test_a_changed_byte_costs_clients_and_never_the_sum(kind, signed, place, flip):
    found = Round(TERMS, identities=IDENTITIES if signed else None)
    on_the_way(kind, place, flip, found)
    # Somebody has noticed: two at most, who no longer understand each other.
    assert 1 <= len(found.errors) <= 2
    assert all(isinstance(e, SecureAggregationError) for e in found.errors.values())
    late = set(found.errors) if kind != "revealed" else set()
    assert_total(found, VECTORS, set(range(5)) - late)


def test_every_byte_of_a_message_of_shares_is_protected():
    found = Round(TERMS).keys().shares()
    messages = found.server.shares_for(0)
    for place in range(MESSAGE_BYTES):
        changed = messages | {3: flipped(messages[3], place, 1)}
        with raises(ShareError, "shares of client 3 for 0"):
            found.clients[0].mask(VECTORS[0], changed, range(5), np.random.default_rng(0))


@settings(max_examples=60, deadline=None)
@given(place=PLACES, flip=FLIPS)
def test_a_stored_session_with_a_changed_byte_is_refused(place, flip):
    session, _ = ClientSession.begin(TERMS, 1)
    with raises(SecureAggregationError, "stored session"):
        ClientSession.from_bytes(flipped(session.to_bytes(), place, flip))


@pytest.mark.parametrize("name", sorted(TERMS.to_plain()))
def test_other_terms_are_other_terms_to_everyone(name):
    changes = {"run": "r", "round": 9, "size": 5, "clients": 4, "threshold": 4, "neighbors": 4,
               "bits": 64, "clipping_range": 2.0}  # fmt: skip
    other = Terms.from_plain(TERMS.to_plain() | {name: changes[name]})
    found = Round(TERMS)
    found.clients[1], ad = ClientSession.begin(other, 1)
    with pytest.raises(SecureAggregationError, match="client 1: expected them made under"):
        found.server.add_advertisement(1, ad)


@settings(max_examples=15, deadline=None)
@given(place=st.integers(0, 4), flip=st.integers(1, 2**32 - 1))
def test_a_changed_masked_number_is_wrong_alone_or_noticed(place, flip):
    def changed(index, vector):
        if index == 1:
            vector[place] ^= np.uint32(flip)
        return vector

    found = Round(TERMS).keys().shares().masked(VECTORS, changed=changed).unmask()
    assert found.errors == {}
    if place == TERMS.size:
        with raises(SecureSumError, "expected 5 vectors in it"):
            found.server.total()
        return
    try:
        total = found.server.total()
    except SecureSumError:
        return
    wrong = np.abs(total.sum - VECTORS.sum(axis=0)) > TERMS.quantizer.error_bound(5)
    assert set(np.flatnonzero(wrong)) <= {place}
