"""Masks, and what the server sees: numbers that tell nothing."""

from __future__ import annotations

import numpy as np
import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from scipy import stats

from fedlora.privacy.secure.keys import mask_seed, opened_key, public_of, shared_secret
from fedlora.privacy.secure.masks import apply_masks
from tests.privacy.secure.rounds import Round, terms_of

SEEDS = [bytes([number]) * 32 for number in range(5)]
# Of a uniform stream, one in a million runs fails a test at this level; the file has 28 of them.
LEVEL = 1e-6


def keystream(seed: bytes, numbers: int, dtype: str) -> np.ndarray:
    """AES-256 in counter mode from the counter 0, in one piece."""
    zeros = bytes(numbers * np.dtype(dtype).itemsize)
    data = Cipher(algorithms.AES(seed), modes.CTR(bytes(16))).encryptor().update(zeros)
    return np.frombuffer(data, dtype)


def assert_uniform(numbers: np.ndarray) -> None:
    """Chi-square of the 256 values of every byte, low to high, at `LEVEL` each."""
    for column in numbers.view(np.uint8).reshape(len(numbers), -1).T:
        counts = np.bincount(column, minlength=256)
        assert stats.chisquare(counts).pvalue > LEVEL


def assert_uncorrelated(one: np.ndarray, other: np.ndarray) -> None:
    """The correlation of two vectors, normal with a deviation of 1 / sqrt(n), at `LEVEL`."""
    found = np.corrcoef(one.astype(np.float64), other.astype(np.float64))[0, 1]
    assert abs(found) * len(one) ** 0.5 < stats.norm.isf(LEVEL / 2)


@pytest.mark.parametrize("dtype", ["<u4", "<u8"])
@pytest.mark.parametrize("size", [0, 1, 3, 65_536, 70_001])
def test_masks_are_the_keystreams_in_the_ring(dtype, size):
    start = np.arange(size, dtype=dtype)
    vector = start.copy()
    apply_masks(vector, SEEDS[:3], SEEDS[3:])
    streams = [keystream(seed, size, dtype) for seed in SEEDS]
    expected = start + streams[0] + streams[1] + streams[2] - streams[3] - streams[4]
    assert np.array_equal(vector, expected)
    apply_masks(vector, SEEDS[3:], SEEDS[:3])
    assert np.array_equal(vector, start)


def masked(bits: int, value: float = 0.25, size: int = 1 << 15, **kind: object) -> np.ndarray:
    """What the server gets of client 0, whose vector is `value` everywhere, without the count."""
    terms = terms_of(3, size=size, bits=bits)
    seen = {}
    found = Round(terms, **kind).keys().shares()
    vectors = np.full((3, size), value)
    found.masked(vectors, changed=lambda i, v: seen.setdefault(i, v.copy()))
    return seen[0][:-1]


@pytest.mark.parametrize("bits", [32, 64])
def test_every_byte_of_a_masked_vector_is_uniform(bits):
    assert_uniform(masked(bits))


def test_two_maskings_of_the_same_vector_have_nothing_in_common():
    one, other = masked(32), masked(32)
    assert_uncorrelated(one, other)
    assert_uniform(one - other)


def test_two_clients_with_the_same_vector_have_nothing_in_common():
    terms = terms_of(3, size=1 << 15)
    seen = {}
    Round(terms).keys().shares().masked(
        np.zeros((3, terms.size)), changed=lambda i, v: seen.setdefault(i, v.copy())
    )
    assert_uncorrelated(seen[0][:-1], seen[1][:-1])
    assert_uniform(seen[0][:-1] - seen[1][:-1])


def test_a_late_vector_stays_masked_though_the_pairwise_key_of_its_client_is_open():
    terms = terms_of(3, size=1 << 15)
    late, secrets = {}, {}
    found = Round(terms, lost={"masked": {0}}).keys().shares()
    secrets.update({i: c._state["mask_secret"] for i, c in found.clients.items()})
    vectors = np.full((3, terms.size), 0.25)
    # The client's vector is on its way while the server calls it lost.
    session = found.clients[0]
    draws = np.random.default_rng(0)
    late[0] = session.mask(vectors[0], found.server.shares_for(0), (0, 1, 2), draws)
    found.errors[0] = None
    found.masked(vectors).unmask()
    opened = found.server._opened(0, 1)
    assert opened == secrets[0]
    vector = late[0][:-1].copy()
    own = 0, public_of(opened)
    for other in (1, 2):
        theirs = other, public_of(secrets[other])
        # Client 0 has the lower index: it added.
        seed = mask_seed(terms, shared_secret(opened_key(opened), theirs[1], other), own, theirs)
        apply_masks(vector, subtract=[seed])
    assert_uniform(vector)


def test_the_bare_vector_would_fail_the_test_of_uniformity():
    terms = terms_of(3, size=1 << 15)
    bare = terms.quantizer.quantize(np.full(terms.size, 0.25), np.random.default_rng(0))
    assert stats.chisquare(np.bincount(bare.view(np.uint8), minlength=256)).pvalue < LEVEL
