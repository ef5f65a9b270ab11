"""Shamir's secret sharing: against the formula, at its edges, and what it cannot be made to do."""

from __future__ import annotations

import contextlib
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.errors import ShareError, ThresholdError
from fedlora.privacy.secure.shamir import PRIME, SHARE_BYTES, combine, split
from tests.matching import raises
from tests.reference import secure as slow

SECRETS = st.one_of(st.binary(min_size=32, max_size=32),
                    st.sampled_from([bytes(32), b"\xff" * 32]))  # fmt: skip


def is_probably_prime(number: int, draws: random.Random) -> bool:
    """Miller and Rabin; a composite passes 40 draws with a probability below 2**-80."""
    odd, twos = number - 1, 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    for _ in range(40):
        value = pow(draws.randrange(2, number - 1), odd, number)
        if value in (1, number - 1):
            continue
        if not any((value := value * value % number) == number - 1 for _ in range(twos - 1)):
            return False
    return True


def test_the_field_is_the_first_above_32_bytes():
    draws = random.Random(0)
    assert PRIME == slow.PRIME
    assert is_probably_prime(PRIME, draws)
    assert not any(is_probably_prime(n, draws) for n in range(2**256 + 1, PRIME, 2))
    assert PRIME < 256**SHARE_BYTES


@settings(max_examples=60, deadline=None)
@given(secret=SECRETS, count=st.integers(1, 12), data=st.data())
def test_any_threshold_of_the_shares_give_the_secret(secret, count, data):
    threshold = data.draw(st.integers(1, count))
    places = data.draw(
        st.lists(st.integers(1, 10_000), min_size=count, max_size=count, unique=True)
    )
    shares = split(secret, threshold, places)
    chosen = data.draw(st.lists(st.sampled_from(places), min_size=threshold, unique=True))
    assert combine({place: shares[place] for place in chosen}, threshold) == secret
    assert {len(share) for share in shares.values()} == {SHARE_BYTES}


@settings(max_examples=30, deadline=None)
@given(secret=SECRETS, count=st.integers(1, 9), seed=st.integers(0, 99))
def test_shares_are_those_of_the_slow_twin(secret, count, seed):
    draws = random.Random(seed)
    coefficients = [draws.randrange(PRIME) for _ in range(count - 1)]
    places = draws.sample(range(1, 600), count)
    given_out = iter(coefficients)
    fast = split(secret, count, places, lambda bound: next(given_out))
    twin = slow.shares(int.from_bytes(secret, "big"), coefficients, places)
    assert {place: int.from_bytes(share, "big") for place, share in fast.items()} == twin
    assert slow.secret_of(twin) == int.from_bytes(combine(fast, count), "big")


def test_one_share_too_few_fits_every_secret():
    # With t - 1 shares and any made-up secret there is one polynomial: find it, and see it fit.
    secret, threshold = b"s" * 32, 4
    shares = {
        p: int.from_bytes(s, "big") for p, s in split(secret, threshold, [1, 2, 3, 4]).items()
    }
    known = {place: shares[place] for place in (1, 2, 3)}
    for other in (0, 1, 2**256 - 1):
        # The value at place 4 that makes the secret `other`: linear in that share.
        weight = slow.secret_of({1: 0, 2: 0, 3: 0, 4: 1})
        missing = (other - slow.secret_of(known | {4: 0})) * pow(weight, -1, PRIME) % PRIME
        opened = combine(
            {p: v.to_bytes(SHARE_BYTES, "big") for p, v in (known | {4: missing}).items()}, 4
        )
        assert int.from_bytes(opened, "big") == other


def test_hundreds_of_holders():
    secret = bytes(range(32))
    shares = split(secret, 300, range(1, 501))
    assert combine({place: shares[place] for place in range(201, 501)}, 300) == secret


def test_too_few_shares_are_refused():
    shares = split(bytes(32), 3, [1, 2, 3])
    with raises(ThresholdError, "at least 3", "found 2"):
        combine({1: shares[1], 2: shares[2]}, 3)


def test_shares_of_no_32_bytes_are_refused():
    # Places 1 and 2 of the line with the value 2**256 at 0, which no 32 bytes stand for.
    shares = {x: ((2**256 + x) % PRIME).to_bytes(SHARE_BYTES, "big") for x in (1, 2)}
    with raises(ShareError, "32 bytes"):
        combine(shares, 2)


@pytest.mark.parametrize(
    ("share", "text"),
    [(b"", "0 bytes"), (bytes(32), "32 bytes"), (bytes(34), "34 bytes"),
     (PRIME.to_bytes(SHARE_BYTES, "big"), "below the prime")],
)  # fmt: skip
def test_bytes_that_are_no_share_are_refused(share, text):
    with raises(ShareError, "place 1", text):
        combine({1: share}, 1)


@pytest.mark.parametrize("places", [[1, 1, 2], [0, 1, 2], [PRIME, 1, 2], [-1, 1, 2]])
def test_places_twice_or_where_the_secret_is_are_refused(places):
    with raises(ShareError, "distinct places"):
        split(bytes(32), 2, places)


def test_a_share_of_the_secret_itself_is_refused():
    with raises(ShareError, "distinct places"):
        combine({0: bytes(33), 1: bytes(33)}, 2)


@pytest.mark.parametrize("threshold", [0, 4, -1])
def test_a_threshold_that_no_holders_reach_is_refused(threshold):
    with raises(ShareError, "1 to 3", str(threshold)):
        split(bytes(32), threshold, [1, 2, 3])


@pytest.mark.parametrize("length", [0, 31, 33])
def test_a_secret_of_another_length_is_refused(length):
    with raises(ShareError, "32 bytes", str(length)):
        split(bytes(length), 1, [1])


@settings(max_examples=30, deadline=None)
@given(place=st.integers(1, 5), byte=st.integers(0, SHARE_BYTES - 1), flip=st.integers(1, 255))
def test_a_changed_share_never_gives_the_secret(place, byte, flip):
    secret = b"x" * 32
    shares = split(secret, 5, [1, 2, 3, 4, 5])
    changed = bytearray(shares[place])
    changed[byte] ^= flip
    with contextlib.suppress(ShareError):
        assert combine(shares | {place: bytes(changed)}, 5) != secret
